//! `berth host`: the report for people or programs.

use std::fmt::Write;

use berth_host::{CgroupVersion, EngineName, Host, KvmKind, PressureSome};

use berth_machine::options::size::show;

/// The report on this host, ready to print.
pub fn report(json: bool) -> String {
    let host = Host::probe();
    if json {
        // Serializing plain data cannot fail.
        serde_json::to_string_pretty(&host).unwrap_or_default() + "\n"
    } else {
        text(&host)
    }
}

fn text(host: &Host) -> String {
    let mut out = String::new();
    for (label, value) in lines(host) {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{label:<14}{value}");
    }
    out
}

fn lines(host: &Host) -> Vec<(&'static str, String)> {
    let cpu = &host.cpu;
    let engine = match host.engine.engine {
        EngineName::Kvm => "kvm",
        EngineName::Soft => "soft",
    };
    let mut lines = vec![
        ("engine", format!("auto takes {engine}: {}", host.engine.reason)),
        ("CPU", known(cpu.model.as_deref())),
        ("", cpu_features(host)),
        ("cores", format!("{} online, {} usable by this process", cpu.online, cpu.usable)),
        ("TSC", tsc(host)),
        ("/dev/kvm", kvm(host)),
        ("memory", memory(host)),
        ("huge pages", huge_pages(host)),
        ("KSM", ksm(host)),
    ];
    lines.extend(swap(host).into_iter().map(|value| ("swap", value)));
    lines.push(("pressure", pressure(host)));
    lines.push(("userfaultfd", userfaultfd(host)));
    if host.cgroups.is_empty() {
        lines.push(("cgroups", "none visible".to_owned()));
    }
    lines.extend(host.cgroups.iter().map(|c| {
        let version = match c.version {
            CgroupVersion::V1 => "v1",
            CgroupVersion::V2 => "v2",
        };
        let controllers =
            if c.controllers.is_empty() { "no controllers".into() } else { c.controllers.join(" ") };
        let writable = if c.writable { "writable" } else { "not writable" };
        ("cgroups", format!("{version}, {controllers}, {writable}: {}", c.path))
    }));
    lines
}

fn known(value: Option<&str>) -> String {
    value.unwrap_or("unknown").to_owned()
}

fn cpu_features(host: &Host) -> String {
    let cpu = &host.cpu;
    let virtualization = match (cpu.vmx, cpu.svm) {
        (true, _) => "vmx",
        (_, true) => "svm",
        _ => "neither vmx nor svm",
    };
    let place = if cpu.hypervisor { ", itself a virtual machine" } else { "" };
    let vendor = known(cpu.vendor.as_deref());
    format!("{vendor}, x86-64-v{}, {virtualization}{place}", cpu.x86_64_level)
}

fn tsc(host: &Host) -> String {
    let invariant = if host.cpu.tsc.invariant { "invariant" } else { "not invariant" };
    format!("{invariant}, the host's clock is {}", known(host.cpu.tsc.clocksource.as_deref()))
}

fn kvm(host: &Host) -> String {
    match (host.kvm.kind, &host.kvm.problem) {
        (Some(KvmKind::Hardware), _) => "works, by the CPU's virtualization".to_owned(),
        (Some(KvmKind::PageTables), _) => "works, by page tables and emulation only".to_owned(),
        (None, problem) => known(problem.as_deref()),
    }
}

fn memory(host: &Host) -> String {
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), show);
    format!("{}, {} available", size(host.memory.total), size(host.memory.available))
}

fn huge_pages(host: &Host) -> String {
    let mut text = format!("transparent: {}", known(host.huge_pages.transparent.as_deref()));
    for pool in &host.huge_pages.hugetlb {
        text.push_str(&format!("; {}: {} reserved, {} free", show(pool.page_size), pool.total, pool.free));
    }
    text
}

fn ksm(host: &Host) -> String {
    match &host.ksm {
        None => "not in this kernel".to_owned(),
        Some(k) if k.running => format!("runs, {} pages saved by {} shared", k.pages_sharing, k.pages_shared),
        Some(_) => "there, does not run".to_owned(),
    }
}

fn swap(host: &Host) -> Vec<String> {
    let zswap = match host.swap.zswap {
        Some(true) => ", with zswap",
        _ => "",
    };
    if host.swap.areas.is_empty() {
        return vec![format!("none{zswap}")];
    }
    let area = |a: &berth_host::SwapArea| {
        let kind = if a.zram { " (zram)" } else { "" };
        format!("{}{kind}: {} of {} used{zswap}", a.path, show(a.used), show(a.size))
    };
    host.swap.areas.iter().map(area).collect()
}

fn pressure(host: &Host) -> String {
    let Some(p) = &host.pressure else { return "not in this kernel, or hidden".to_owned() };
    let of =
        |p: Option<PressureSome>| p.map_or_else(|| "unknown".to_owned(), |p| format!("{:.1} %", p.avg10));
    format!("CPU {}, memory {}, I/O {} (last 10 s)", of(p.cpu), of(p.memory), of(p.io))
}

fn userfaultfd(host: &Host) -> String {
    let u = &host.userfaultfd;
    let unprivileged = match u.unprivileged {
        Some(true) => ", unprivileged users may",
        _ => "",
    };
    let text = match (u.all_faults, u.user_faults, u.device) {
        (true, ..) => "all faults",
        (_, true, true) => "user faults; all faults through /dev/userfaultfd",
        (_, true, false) => "user faults only",
        (_, false, true) => "through /dev/userfaultfd",
        (_, false, false) => "not usable",
    };
    format!("{text}{unprivileged}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The report on a host that consists of these files.
    fn report_on(files: &[(&str, &str)]) -> String {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        text(&Host::probe_below(root.path()))
    }

    #[test]
    fn a_host_with_everything() {
        let report = report_on(&[
            (
                "proc/cpuinfo",
                "processor: 0\nvendor_id: GenuineIntel\nmodel name: Sample\nflags: vmx constant_tsc nonstop_tsc\n",
            ),
            ("proc/meminfo", "MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8\n"),
            ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n"),
            ("sys/kernel/mm/ksm/run", "1\n"),
            ("sys/kernel/mm/ksm/pages_sharing", "70\n"),
            ("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 2097152 1024 100\n"),
            ("proc/pressure/cpu", "some avg10=1.50 avg60=0.00 avg300=0.00 total=0\n"),
            ("proc/self/mountinfo", "1 2 0:1 / /sys/fs/cgroup rw - cgroup2 none rw\n"),
            ("proc/self/cgroup", "0::/\n"),
        ]);
        for part in [
            "Sample",
            "vmx",
            "invariant",
            "there is no /dev/kvm",
            "2 GiB, 1 GiB available",
            "madvise; 2 MiB: 8 reserved, 3 free",
            "70 pages saved",
            "/dev/zram0 (zram): 1 MiB of 2 GiB used",
            "CPU 1.5 %",
            "v2, no controllers, not writable: /sys/fs/cgroup",
            "auto takes soft",
        ] {
            assert!(report.contains(part), "no {part:?} in:\n{report}");
        }
    }

    #[test]
    fn a_host_that_says_nothing() {
        let report = report_on(&[]);
        assert!(report.contains("unknown") && report.contains("none visible"), "{report}");
    }
}

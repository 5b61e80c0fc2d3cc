//! The CPUs: `/proc/cpuinfo` (proc(5)) and their neighbours in `/sys`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use crate::read;

/// What the host's CPUs are. All CPUs of a host are taken to be like the first.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cpu {
    /// Name of the model.
    pub model: Option<String>,
    /// Vendor as CPUID leaf 0 names it, such as `GenuineIntel`.
    pub vendor: Option<String>,
    /// Intel's virtualization is there (and not hidden or switched off).
    pub vmx: bool,
    /// AMD's virtualization is there.
    pub svm: bool,
    /// This host is itself a virtual machine.
    pub hypervisor: bool,
    /// Level of the x86-64 psABI, 1 to 4.
    pub x86_64_level: u8,
    /// Logical CPUs that are online.
    pub online: u64,
    /// Logical CPUs that this process may use.
    pub usable: u64,
    /// The time stamp counter.
    pub tsc: Tsc,
}

/// The time stamp counter (SDM volume 3, 18.17).
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tsc {
    /// Same rate in all power states, and never stops: `constant_tsc` and `nonstop_tsc`.
    pub invariant: bool,
    /// The clock that the host's kernel uses.
    pub clocksource: Option<String>,
}

/// More than the first CPU takes in `/proc/cpuinfo`.
const ONE_CPU: u64 = 16 << 10;

impl Cpu {
    /// As [`Self::read`], but only what the first CPU says in `/proc/cpuinfo`, which is long on large hosts: vendor
    /// and flags, nothing that is counted.
    pub fn virtualization(root: &Path) -> Self {
        let mut text = String::new();
        if let Ok(file) = File::open(root.join("proc/cpuinfo")) {
            // What was read before an error counts.
            let _ = file.take(ONE_CPU).read_to_string(&mut text);
        }
        parse_cpuinfo(text.split("\n\n").next().unwrap_or_default())
    }

    /// Whether it has virtualization of its own.
    pub fn virtualizes(&self) -> bool {
        self.vmx || self.svm
    }

    /// Reads the files below `root`.
    pub fn read(root: &Path) -> Self {
        let mut cpu = parse_cpuinfo(&read::text(root, "proc/cpuinfo").unwrap_or_default());
        let online = read::text(root, "sys/devices/system/cpu/online");
        if let Some(n) = online.as_deref().and_then(read::list_len).filter(|n| *n > 0) {
            cpu.online = n;
        }
        let status = read::text(root, "proc/self/status").unwrap_or_default();
        cpu.usable = parse_allowed(&status).unwrap_or(cpu.online);
        cpu.tsc.clocksource =
            read::text(root, "sys/devices/system/clocksource/clocksource0/current_clocksource");
        cpu
    }
}

fn parse_allowed(status: &str) -> Option<u64> {
    read::list_len(status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"))?)
}

fn parse_cpuinfo(text: &str) -> Cpu {
    let fields = || text.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k.trim(), v.trim()));
    let first = |name: &str| fields().find(|(k, _)| *k == name).map(|(_, v)| v.to_owned());
    let flags = first("flags").unwrap_or_default();
    let flags: BTreeSet<&str> = flags.split_whitespace().collect();
    Cpu {
        model: first("model name"),
        vendor: first("vendor_id"),
        vmx: flags.contains("vmx"),
        svm: flags.contains("svm"),
        hypervisor: flags.contains("hypervisor"),
        x86_64_level: x86_64_level(&flags),
        online: fields().filter(|(k, _)| *k == "processor").count() as u64,
        usable: 0,
        tsc: Tsc {
            invariant: flags.contains("constant_tsc") && flags.contains("nonstop_tsc"),
            clocksource: None,
        },
    }
}

/// The level by the flags that it adds to the one below (x86-64 psABI, 3.1.1, table 3.1), under the names that
/// Linux gives them: `pni` is SSE3 and `abm` stands for LZCNT.
fn x86_64_level(flags: &BTreeSet<&str>) -> u8 {
    const ADDED: [&[&str]; 3] = [
        &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"],
        &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
        &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
    ];
    1 + ADDED.iter().take_while(|level| level.iter().all(|f| flags.contains(f))).count() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Sample CPU @ 2.00GHz
flags\t\t: fpu tsc vmx constant_tsc nonstop_tsc cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx
power management:

processor\t: 1
vendor_id\t: GenuineIntel
";

    #[test]
    fn cpuinfo_of_a_machine_with_vmx() {
        let cpu = parse_cpuinfo(SAMPLE);
        assert_eq!(cpu.model.as_deref(), Some("Sample CPU @ 2.00GHz"));
        assert_eq!(cpu.vendor.as_deref(), Some("GenuineIntel"));
        assert!(cpu.vmx && !cpu.svm && !cpu.hypervisor && cpu.tsc.invariant);
        assert_eq!((cpu.online, cpu.x86_64_level), (2, 2));
    }

    #[test]
    fn the_first_cpu_is_enough_for_its_flags() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("proc")).unwrap();
        std::fs::write(root.path().join("proc/cpuinfo"), SAMPLE.to_owned() + &"x".repeat(1 << 20)).unwrap();
        let cpu = Cpu::virtualization(root.path());
        assert!(cpu.vmx && !cpu.svm);
        assert!(!Cpu::virtualization(Path::new("/nonexistent")).vmx);
    }

    #[test]
    fn levels_build_on_each_other() {
        let v2 = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"];
        let v3 = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"];
        let level = |flags: &[&'static str]| x86_64_level(&flags.iter().copied().collect());
        assert_eq!(level(&[]), 1);
        assert_eq!(level(&v2), 2);
        assert_eq!(level(&[v2.as_slice(), &v3].concat()), 3);
        assert_eq!(level(&v3), 1);
    }

    #[test]
    fn affinity_is_counted() {
        assert_eq!(parse_allowed("Name:\tx\nCpus_allowed_list:\t0,2-3\n"), Some(3));
        assert_eq!(parse_allowed(""), None);
    }
}

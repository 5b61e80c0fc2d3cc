//! VMs for tests.

use berth_api::types::{
    DiskStats, GuestMemoryStats, MemoryStats, NetStats, ThreadStats, VcpuStats, VmState, VmStats,
};

use super::sample::{Sample, VmSample};

/// A VM with two vCPUs, a disk and a network interface, as it was at `at`.
pub fn vm(name: &str, at: f64, cpu_seconds: f64) -> VmSample {
    let vcpu = |id: u8| VcpuStats {
        id,
        thread: ThreadStats {
            tid: 100 + u32::from(id),
            name: format!("{name}/vcpu{id}"),
            state: "S".to_owned(),
            host_cpu: id.into(),
            cpu_seconds: 1.0,
            run_queue_wait_seconds: 0.25,
        },
    };
    let stats = VmStats {
        state: VmState::Running,
        at,
        uptime_seconds: at,
        cpu_seconds,
        vcpus: vec![vcpu(0), vcpu(1)],
        memory: MemoryStats {
            size_bytes: 512 << 20,
            resident_bytes: 100 << 20,
            guest: Some(GuestMemoryStats { stored_bytes: 64 << 20, ..GuestMemoryStats::default() }),
            ..MemoryStats::default()
        },
        balloon: None,
        disks: vec![DiskStats::default()],
        nets: vec![NetStats::default()],
    };
    VmSample { name: name.to_owned(), pid: Some(4711), state: VmState::Running, stats: Some(stats) }
}

/// A sample of these VMs.
pub fn sample(vms: Vec<VmSample>) -> Sample {
    Sample { vms, ..Sample::default() }
}

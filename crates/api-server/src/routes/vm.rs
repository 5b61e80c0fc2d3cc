//! What the VM is and what it uses.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use berth_api::types::{
    BalloonStats, DiskStats, EngineCounter, EngineStats, GuestMemoryStats, MemoryStats, NetStats, StoreStats,
    VcpuStats, VmInfo, VmStats,
};
use berth_machine::{MachineControl, MachineState, NetCounters};

use crate::server::{Shared, unix_seconds};
use crate::threads;

/// What the VM is, and how it is doing
#[utoipa::path(get, path = "/vm", tag = "vm", responses((status = 200, body = VmInfo)))]
pub async fn info(State(shared): State<Arc<Shared>>) -> Json<VmInfo> {
    Json(shared.info())
}

/// What the VM uses
#[utoipa::path(get, path = "/stats", tag = "vm", responses((status = 200, body = VmStats)))]
pub async fn stats(State(shared): State<Arc<Shared>>) -> Json<VmStats> {
    Json(measure(&shared))
}

/// What the engine counted
#[utoipa::path(get, path = "/engine", tag = "vm", responses((status = 200, body = EngineStats)))]
pub async fn engine(State(shared): State<Arc<Shared>>) -> Json<EngineStats> {
    let counters = shared.vm.control.engine_counters();
    Json(EngineStats {
        engine: shared.vm.description.engine.clone(),
        counters: counters.into_iter().map(|(name, value)| EngineCounter { name, value }).collect(),
    })
}

/// The guest's memory, and the process's.
fn memory(shared: &Shared) -> MemoryStats {
    let memory = shared.vm.control.memory();
    // A host that does not say what is resident (without /proc) leaves this out.
    let usage = memory.usage().ok();
    let guest = usage.map(|usage| GuestMemoryStats {
        untouched_bytes: usage.guest.untouched,
        resident_bytes: usage.guest.resident,
        shared_bytes: usage.guest.shared,
        stored_bytes: usage.guest.stored,
        released_bytes: usage.guest.released,
    });
    let store = memory.store_counters().map(|store| StoreStats {
        pages: store.stored_pages,
        zero_pages: store.zero_pages,
        distinct_pages: store.distinct_pages,
        memory_bytes: store.memory_bytes,
        file_bytes: store.file_bytes,
        can_have_file: shared.vm.has_store_dir,
        evicted_pages: store.evicted,
        refaults: store.refaults,
        latency_p50_seconds: store.latency.quantile(0.5).as_secs_f64(),
        latency_p99_seconds: store.latency.quantile(0.99).as_secs_f64(),
    });
    let share = shared.vm.control.memory_share();
    let process = threads::memory();
    MemoryStats {
        // More exact than what the kernel has at hand, which may miss some pages of each CPU.
        resident_bytes: usage.map_or(process.resident_bytes, |usage| usage.process_resident),
        reserve_bytes: share.reserve,
        limit_bytes: share.limit,
        priority: share.priority,
        before_freeze_bytes: shared.vm.control.resident_before_freeze(),
        size_bytes: memory.size(),
        guest,
        overhead_bytes: usage.map_or(0, |usage| usage.overhead),
        store,
        ..process
    }
}

/// What the VM uses now.
pub fn measure(shared: &Shared) -> VmStats {
    let control = &shared.vm.control;
    let threads = control.vcpu_threads();
    let vcpus =
        (0..).zip(threads).filter_map(|(id, tid)| Some(VcpuStats { id, thread: threads::thread(tid?)? }));
    let balloon = control.balloon().map(|balloon| {
        let status = balloon.status();
        // For who asks next. The guest is not waited for; one that stands still would answer when it goes on.
        if control.state() == MachineState::Running {
            balloon.request_statistics();
        }
        BalloonStats {
            target_bytes: status.target,
            actual_bytes: status.actual,
            reported_bytes: status.reported,
            guest_free_bytes: status.statistics.and_then(|s| s.free),
            guest_available_bytes: status.statistics.and_then(|s| s.available),
        }
    });
    VmStats {
        state: shared.state(),
        at: unix_seconds(SystemTime::now()),
        uptime_seconds: shared.started.elapsed().as_secs_f64(),
        cpu_seconds: threads::process_cpu_seconds(),
        vcpus: vcpus.collect(),
        memory: memory(shared),
        balloon,
        disks: disks(control),
        nets: control.net_counters().into_iter().map(net).collect(),
    }
}

fn disks(control: &MachineControl) -> Vec<DiskStats> {
    let counted = control.disk_sizes().into_iter().zip(control.disk_counters());
    let disk =
        |((id, size_bytes), (_, counters)): ((String, u64), (String, berth_machine::BlockCounters))| {
            DiskStats {
                id,
                size_bytes,
                reads: counters.reads,
                read_bytes: counters.read_bytes,
                writes: counters.writes,
                written_bytes: counters.written_bytes,
                flushes: counters.flushes,
                errors: counters.errors,
            }
        };
    counted.map(disk).collect()
}

fn net((id, counters): (String, NetCounters)) -> NetStats {
    NetStats {
        id,
        received_packets: counters.received_packets,
        received_bytes: counters.received_bytes,
        sent_packets: counters.sent_packets,
        sent_bytes: counters.sent_bytes,
    }
}

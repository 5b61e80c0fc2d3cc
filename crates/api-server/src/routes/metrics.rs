//! Metrics for Prometheus (its text format, version 0.0.4).
//!
//! One line of [`METRICS`] is one metric; docs/metrics.md lists the same, which a test checks.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use berth_api::types::{VmState, VmStats};

use super::vm::measure;
use crate::server::Shared;

const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a metric does over time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only goes up, from the start of the VM's process on.
    Counter,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
        }
    }
}

/// The value of a label besides `vm`, empty if there is none, and the value.
type Samples = Vec<(String, f64)>;

/// A metric: name, kind, label besides `vm`, what it says, and its samples.
type Metric = (&'static str, Kind, &'static str, &'static str, fn(&VmStats) -> Samples);

fn one(value: f64) -> Samples {
    vec![(String::new(), value)]
}

fn state(stats: &VmStats) -> Samples {
    let all = [VmState::Starting, VmState::Running, VmState::Paused, VmState::Frozen, VmState::Ended];
    all.iter().map(|state| (state.to_string(), f64::from(u8::from(stats.state == *state)))).collect()
}

fn vcpus(stats: &VmStats, value: impl Fn(&berth_api::types::ThreadStats) -> f64) -> Samples {
    stats.vcpus.iter().map(|vcpu| (vcpu.id.to_string(), value(&vcpu.thread))).collect()
}

fn disks(stats: &VmStats, value: impl Fn(&berth_api::types::DiskStats) -> u64) -> Samples {
    stats.disks.iter().map(|disk| (disk.id.clone(), value(disk) as f64)).collect()
}

fn nets(stats: &VmStats, value: impl Fn(&berth_api::types::NetStats) -> u64) -> Samples {
    stats.nets.iter().map(|net| (net.id.clone(), value(net) as f64)).collect()
}

fn balloon(stats: &VmStats, value: impl Fn(&berth_api::types::BalloonStats) -> Option<u64>) -> Samples {
    stats.balloon.iter().filter_map(|balloon| Some((String::new(), value(balloon)? as f64))).collect()
}

fn store(stats: &VmStats, value: impl Fn(&berth_api::types::StoreStats) -> f64) -> Samples {
    stats.memory.store.iter().map(|store| (String::new(), value(store))).collect()
}

fn latency(stats: &VmStats) -> Samples {
    let of = |store: &berth_api::types::StoreStats| {
        [("0.5".to_owned(), store.latency_p50_seconds), ("0.99".to_owned(), store.latency_p99_seconds)]
    };
    stats.memory.store.iter().flat_map(of).collect()
}

fn by_state(stats: &VmStats) -> Samples {
    let of = |guest: &berth_api::types::GuestMemoryStats| {
        let states = [
            ("untouched", guest.untouched_bytes),
            ("resident", guest.resident_bytes),
            ("shared", guest.shared_bytes),
            ("stored", guest.stored_bytes),
            ("released", guest.released_bytes),
        ];
        states.map(|(state, bytes)| (state.to_owned(), bytes as f64))
    };
    stats.memory.guest.iter().flat_map(of).collect()
}

use Kind::{Counter, Gauge};

#[rustfmt::skip]
const METRICS: &[Metric] = &[
    ("berth_vm_state", Gauge, "state", "1 for the state that the VM is in, 0 for the others.", state),
    ("berth_vm_uptime_seconds", Gauge, "", "Time since the VM's process started.", |s| one(s.uptime_seconds)),
    ("berth_vm_cpu_seconds_total", Counter, "", "CPU time of all threads of the VM's process.", |s| one(s.cpu_seconds)),
    ("berth_vcpus", Gauge, "", "Number of vCPUs.", |s| one(s.vcpus.len() as f64)),
    ("berth_vcpu_cpu_seconds_total", Counter, "vcpu", "CPU time of the vCPU's thread.", |s| vcpus(s, |t| t.cpu_seconds)),
    ("berth_vcpu_run_queue_wait_seconds_total", Counter, "vcpu", "Time that the vCPU's thread waited for a host CPU: the guest's steal time.", |s| vcpus(s, |t| t.run_queue_wait_seconds)),
    ("berth_memory_size_bytes", Gauge, "", "Memory that the guest was promised.", |s| one(s.memory.size_bytes as f64)),
    ("berth_memory_resident_bytes", Gauge, "", "What of the VM's process is in the host's memory.", |s| one(s.memory.resident_bytes as f64)),
    ("berth_memory_swapped_bytes", Gauge, "", "What of the VM's process is in the host's swap.", |s| one(s.memory.swapped_bytes as f64)),
    ("berth_memory_guest_bytes", Gauge, "state", "Guest memory in the state: the sum is its size.", by_state),
    ("berth_memory_overhead_bytes", Gauge, "", "What the VM costs besides guest memory that is resident.", |s| one(s.memory.overhead_bytes as f64)),
    ("berth_memory_reserve_bytes", Gauge, "", "Guest memory that stays resident.", |s| one(s.memory.reserve_bytes as f64)),
    ("berth_memory_limit_bytes", Gauge, "", "Guest memory that is to be resident at most.", |s| s.memory.limit_bytes.iter().map(|l| (String::new(), *l as f64)).collect()),
    ("berth_memory_priority", Gauge, "", "Who keeps memory when there is not enough for all: lower ones give way first.", |s| one(s.memory.priority.into())),
    ("berth_store_pages", Gauge, "", "Pages in the cold store.", |s| store(s, |c| c.pages as f64)),
    ("berth_store_memory_bytes", Gauge, "", "What the cold store has in memory, compressed.", |s| store(s, |c| c.memory_bytes as f64)),
    ("berth_store_file_bytes", Gauge, "", "What the cold store has in its file, compressed.", |s| store(s, |c| c.file_bytes as f64)),
    ("berth_store_evicted_pages_total", Counter, "", "Pages that went to the cold store.", |s| store(s, |c| c.evicted_pages as f64)),
    ("berth_store_refaults_total", Counter, "", "Pages that came back because they were touched.", |s| store(s, |c| c.refaults as f64)),
    ("berth_store_refault_seconds", Gauge, "quantile", "How long it took at most to bring a page back, for this share of them.", latency),
    ("berth_balloon_target_bytes", Gauge, "", "Memory that the guest was asked to give back.", |s| balloon(s, |b| Some(b.target_bytes))),
    ("berth_balloon_actual_bytes", Gauge, "", "Memory that the guest has given back.", |s| balloon(s, |b| Some(b.actual_bytes))),
    ("berth_balloon_reported_bytes_total", Counter, "", "Memory that the guest has reported as free.", |s| balloon(s, |b| Some(b.reported_bytes))),
    ("berth_guest_free_bytes", Gauge, "", "Memory that the guest does not use, as it said last.", |s| balloon(s, |b| b.guest_free_bytes)),
    ("berth_guest_available_bytes", Gauge, "", "Memory that the guest could have without swapping, as it said last.", |s| balloon(s, |b| b.guest_available_bytes)),
    ("berth_disk_size_bytes", Gauge, "disk", "Size of the disk.", |s| disks(s, |d| d.size_bytes)),
    ("berth_disk_reads_total", Counter, "disk", "Reads that were done.", |s| disks(s, |d| d.reads)),
    ("berth_disk_read_bytes_total", Counter, "disk", "Bytes that were read.", |s| disks(s, |d| d.read_bytes)),
    ("berth_disk_writes_total", Counter, "disk", "Writes that were done.", |s| disks(s, |d| d.writes)),
    ("berth_disk_written_bytes_total", Counter, "disk", "Bytes that were written.", |s| disks(s, |d| d.written_bytes)),
    ("berth_disk_flushes_total", Counter, "disk", "Requests to write out what is cached.", |s| disks(s, |d| d.flushes)),
    ("berth_disk_errors_total", Counter, "disk", "Requests that failed.", |s| disks(s, |d| d.errors)),
    ("berth_net_received_packets_total", Counter, "net", "Packets to the guest.", |s| nets(s, |n| n.received_packets)),
    ("berth_net_received_bytes_total", Counter, "net", "Bytes to the guest.", |s| nets(s, |n| n.received_bytes)),
    ("berth_net_sent_packets_total", Counter, "net", "Packets from the guest.", |s| nets(s, |n| n.sent_packets)),
    ("berth_net_sent_bytes_total", Counter, "net", "Bytes from the guest.", |s| nets(s, |n| n.sent_bytes)),
];

/// Metrics for Prometheus
///
/// Names and units are in docs/metrics.md. Each sample has the label `vm` with the VM's name.
#[utoipa::path(get, path = "/metrics", tag = "vm", responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, FORMAT)], render(&shared.vm.description.name, &measure(&shared)))
}

/// The text. Names of VMs and devices have no characters that a label's value would have to escape.
fn render(vm: &str, stats: &VmStats) -> String {
    let mut text = String::new();
    for (name, kind, label, help, samples) in METRICS {
        let samples = samples(stats);
        if samples.is_empty() {
            continue;
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {}", kind.name());
        for (value_of_label, value) in samples {
            let label =
                if label.is_empty() { String::new() } else { format!(",{label}=\"{value_of_label}\"") };
            let _ = writeln!(text, "{name}{{vm=\"{vm}\"{label}}} {value}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docs_list_every_metric() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        let text = std::fs::read_to_string(path).unwrap();
        let listed: Vec<&str> = text.lines().filter(|l| l.starts_with("| `berth_")).collect();
        let expected: Vec<String> = METRICS
            .iter()
            .map(|(name, kind, label, help, _)| {
                let label = if label.is_empty() { String::new() } else { format!("`{label}`") };
                format!("| `{name}` | {} | {label} | {help} |", kind.name())
            })
            .collect();
        assert_eq!(listed, expected);
    }

    #[test]
    fn names_end_with_their_unit_and_counters_with_total() {
        for (name, kind, ..) in METRICS {
            assert_eq!(*kind == Counter, name.ends_with("_total"), "{name}");
        }
    }
}

//! The rows of the table: filtered and sorted.

use std::cmp::Ordering;

use berth_api::types::VmState;
use ratatui::layout::Constraint;

use super::format::{bytes, percent, size};
use super::rates::{VcpuRates, VmRates};

/// A column: title, width (the first as its names need), and how VMs are compared by it.
pub struct Column {
    /// Its title.
    pub title: &'static str,
    /// Its width in characters; 0 for what its names need.
    pub width: u16,
    compare: fn(&VmRates, &VmRates) -> Ordering,
}

/// From the left. With a name of 12 characters they fit into 80.
pub const COLUMNS: [Column; 12] = [
    Column { title: "NAME", width: 0, compare: |a, b| a.name.cmp(&b.name) },
    Column { title: "STATE", width: 7, compare: |a, b| state(a.state).cmp(state(b.state)) },
    Column { title: "CPU%", width: 6, compare: |a, b| falling(a.cpu_percent, b.cpu_percent) },
    Column { title: "STEAL%", width: 6, compare: |a, b| falling(a.steal_percent, b.steal_percent) },
    Column { title: "ON", width: 3, compare: |a, b| b.vcpus.len().cmp(&a.vcpus.len()) },
    Column { title: "MEM", width: 5, compare: |a, b| b.memory_bytes.cmp(&a.memory_bytes) },
    Column { title: "RES", width: 5, compare: |a, b| b.resident_bytes.cmp(&a.resident_bytes) },
    Column { title: "STORE", width: 5, compare: |a, b| b.stored_bytes.cmp(&a.stored_bytes) },
    Column { title: "DISKR", width: 5, compare: |a, b| falling(a.disk_read, b.disk_read) },
    Column { title: "DISKW", width: 5, compare: |a, b| falling(a.disk_written, b.disk_written) },
    Column { title: "NETRX", width: 5, compare: |a, b| falling(a.net_received, b.net_received) },
    Column { title: "NETTX", width: 5, compare: |a, b| falling(a.net_sent, b.net_sent) },
];

/// The column that is sorted by at first: CPU.
pub const BY_CPU: usize = 2;

/// How wide the columns are where the longest name of `rows` has as much room as it needs, up to all of `width` that
/// the others leave.
pub fn widths(rows: &[Row], width: u16) -> [Constraint; COLUMNS.len()] {
    let others: u16 = COLUMNS.iter().filter(|c| c.width > 0).map(|c| c.width + SPACING).sum();
    let longest = rows.iter().map(|row| row.cells[0].chars().count()).max().unwrap_or(0);
    let name = u16::try_from(longest).unwrap_or(u16::MAX).min(width.saturating_sub(others)).max(8);
    COLUMNS.each_ref().map(|c| Constraint::Length(if c.width == 0 { name } else { c.width }))
}

/// Between two columns.
pub const SPACING: u16 = 1;

/// Larger ones first; those that are not known last.
fn falling(a: Option<f64>, b: Option<f64>) -> Ordering {
    b.unwrap_or(-1.0).total_cmp(&a.unwrap_or(-1.0))
}

/// A row as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// A cell a column.
    pub cells: [String; COLUMNS.len()],
    /// Whether it is a VM, or one of its vCPUs.
    pub is_vm: bool,
}

/// What the user chose.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The column that is sorted by.
    pub column: usize,
    /// The other way round.
    pub reverse: bool,
    /// Only VMs with this in their names.
    pub filter: String,
    /// With vCPU threads.
    pub threads: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Self { column: BY_CPU, reverse: false, filter: String::new(), threads: false }
    }
}

/// The rows.
pub fn rows(vms: &[VmRates], choice: &Choice) -> Vec<Row> {
    let mut shown: Vec<&VmRates> = vms.iter().filter(|vm| vm.name.contains(&choice.filter)).collect();
    if let Some(column) = COLUMNS.get(choice.column) {
        // Names decide what the column does not.
        shown.sort_by(|a, b| {
            let order = (column.compare)(a, b);
            if choice.reverse { order.reverse() } else { order }.then_with(|| a.name.cmp(&b.name))
        });
    }
    let threads = |vm: &VmRates| {
        let vcpus = vm.vcpus.iter().filter(|_| choice.threads);
        vcpus.map(vcpu_row).collect::<Vec<Row>>()
    };
    shown.into_iter().flat_map(|vm| std::iter::once(vm_row(vm)).chain(threads(vm))).collect()
}

fn vm_row(vm: &VmRates) -> Row {
    Row {
        cells: [
            vm.name.clone(),
            state(vm.state).to_owned(),
            percent(vm.cpu_percent),
            percent(vm.steal_percent),
            format!("x{}", vm.vcpus.len()),
            size(vm.memory_bytes),
            size(vm.resident_bytes),
            size(vm.stored_bytes),
            bytes(vm.disk_read),
            bytes(vm.disk_written),
            bytes(vm.net_received),
            bytes(vm.net_sent),
        ],
        is_vm: true,
    }
}

fn vcpu_row(vcpu: &VcpuRates) -> Row {
    let mut cells = [const { String::new() }; COLUMNS.len()];
    cells[0] = format!("  vcpu{}", vcpu.id);
    cells[1] = thread_state(&vcpu.state).to_owned();
    cells[2] = percent(vcpu.cpu_percent);
    cells[3] = percent(vcpu.steal_percent);
    cells[4] = vcpu.host_cpu.to_string();
    Row { cells, is_vm: false }
}

/// A state in at most seven letters.
fn state(state: VmState) -> &'static str {
    match state {
        VmState::Starting => "starts",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Frozen => "frozen",
        VmState::Ended => "ended",
        VmState::Killed => "killed",
        VmState::Unresponsive => "silent",
    }
}

/// The scheduler's letter (proc(5)) in at most seven letters.
fn thread_state(letter: &str) -> &str {
    match letter {
        "R" => "ready",
        "S" => "sleeps",
        "D" => "waits",
        "T" | "t" => "stopped",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::rates::Rates;
    use crate::top::testing::{sample, vm};

    /// `busy` took 3 s of CPU time in 2 s, `idle` none, `new` is there for the first time.
    fn vms() -> Vec<VmRates> {
        let old = sample(vec![vm("busy", 10.0, 1.0), vm("idle", 10.0, 9.0)]);
        let new = sample(vec![vm("busy", 12.0, 4.0), vm("idle", 12.0, 9.0), vm("new", 12.0, 50.0)]);
        Rates::between(&old, &new).vms
    }

    fn names(choice: &Choice) -> Vec<String> {
        rows(&vms(), choice).into_iter().map(|r| r.cells[0].clone()).collect()
    }

    #[test]
    fn the_busiest_come_first_and_the_unknown_last() {
        assert_eq!(names(&Choice::default()), ["busy", "idle", "new"]);
        let reverse = Choice { reverse: true, ..Choice::default() };
        assert_eq!(names(&reverse), ["new", "idle", "busy"]);
        for column in 0..COLUMNS.len() {
            assert_eq!(names(&Choice { column, ..Choice::default() }).len(), 3);
        }
    }

    #[test]
    fn a_filter_leaves_some_and_threads_follow_their_vm() {
        let choice = Choice { filter: "e".to_owned(), threads: true, ..Choice::default() };
        assert_eq!(names(&choice), ["idle", "  vcpu0", "  vcpu1", "new", "  vcpu0", "  vcpu1"]);
        let none = Choice { filter: "no such".to_owned(), ..Choice::default() };
        assert!(names(&none).is_empty());
    }

    #[test]
    fn cells_fit_into_their_columns() {
        let all = rows(&vms(), &Choice { threads: true, ..Choice::default() });
        for (row, column) in all.iter().flat_map(|r| r.cells.iter().zip(&COLUMNS)) {
            assert!(column.width == 0 || row.len() <= usize::from(column.width), "{row} in {}", column.title);
        }
        assert_eq!(all[0].cells[2], "150.0");
        // The first column, and a space between each.
        let width: u16 =
            COLUMNS.iter().map(|c| c.width.max(12) * u16::from(c.width == 0) + c.width + 1).sum();
        assert!(width - 1 <= 80, "{width}");
    }
}

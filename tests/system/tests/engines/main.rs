//! All cases on every engine: `cargo nextest run -p berth-tests-system kvm::interrupts`.

mod accesses;
mod clock;
mod debugging;
mod dirty_log;
mod engine_contract;
mod exceptions;
mod fast_paths;
mod floating_point;
mod interrupts;
mod mode_switches;
mod multiprocessor;
mod paging_rights;
mod privilege;
mod remapping;
mod segmentation;
mod self_modifying;

use berth_tests_system::run::{Group, run};

fn main() {
    run(&[
        Group { name: "accesses", cases: accesses::CASES },
        Group { name: "clock", cases: clock::CASES },
        Group { name: "debugging", cases: debugging::CASES },
        Group { name: "dirty_log", cases: dirty_log::CASES },
        Group { name: "engine_contract", cases: engine_contract::CASES },
        Group { name: "exceptions", cases: exceptions::CASES },
        Group { name: "fast_paths", cases: fast_paths::CASES },
        Group { name: "floating_point", cases: floating_point::CASES },
        Group { name: "interrupts", cases: interrupts::CASES },
        Group { name: "mode_switches", cases: mode_switches::CASES },
        Group { name: "multiprocessor", cases: multiprocessor::CASES },
        Group { name: "paging_rights", cases: paging_rights::CASES },
        Group { name: "privilege", cases: privilege::CASES },
        Group { name: "remapping", cases: remapping::CASES },
        Group { name: "segmentation", cases: segmentation::CASES },
        Group { name: "self_modifying", cases: self_modifying::CASES },
    ])
}

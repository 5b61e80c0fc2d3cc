//! What the kvm engine cannot do on some hosts, by case and with the reason.

use std::path::Path;

use berth_host::{Cpu, Kvm, KvmKind};

/// What executes the cases of the kvm engine.
pub enum KvmHost {
    /// Nothing, for this reason.
    None(String),
    /// The CPU's virtualization: every case runs.
    Hardware,
    /// A KVM without vmx and svm, which emulates kernels: all but those in [`PAGE_TABLES`] run.
    PageTables,
}

/// Reasons and the cases that they are about.
type Table = &'static [(&'static str, &'static [&'static str])];

/// Cases that a page-table-based KVM cannot run, by what it lacks. Seen with Linux 6.18 on a host without vmx and
/// svm; code at level 3 is executed there by the CPU, all other code is emulated.
pub const PAGE_TABLES: Table = &[
    (
        "INT n, INT1, INT3, INTO and BOUND are not emulated, and #UD at level 3 (INT3 there ignores the gate's DPL)",
        &[
            "debugging::int_n_clears_tf_without_a_step",
            "exceptions::a_vector_outside_the_idt_is_gp_with_the_idt_bit",
            "exceptions::bp_from_level_3_needs_dpl_3",
            "exceptions::bp_is_a_trap",
            "exceptions::br_by_bound",
            "exceptions::db_of_int1",
            "exceptions::int_n_pushes_the_next_address",
            "exceptions::np_by_a_gate_that_is_not_present",
            "exceptions::of_by_into_only_with_overflow",
            "interrupts::a_trap_gate_leaves_if_alone",
            "interrupts::the_handler_of_an_interrupt_gate_is_not_interrupted",
            "privilege::an_ist_stack_is_used_without_a_change_of_level",
            "privilege::iretd_to_level_3_in_32_bit_mode_clears_inner_segments",
            "privilege::iretq_to_level_3_and_back",
            "remapping::code_that_loses_its_user_bit_faults_at_level_3_only",
            "self_modifying::by_another_vcpu_with_a_breakpoint_first",
        ],
    ),
    (
        "x87, SSE and AVX instructions, WAIT, XSAVE and what belongs to them are not emulated at level 0",
        &[
            "accesses::a_wide_vector_across_pages",
            "engine_contract::a_kick_without_anything_pending_changes_nothing",
            "engine_contract::state_moves_to_another_engine_in_the_middle",
            "engine_contract::stop_and_run_again_continue_exactly",
            "exceptions::em_makes_x87_nm_and_sse_ud",
            "exceptions::gp_by_misaligned_vector_memory",
            "exceptions::gp_by_reserved_bits_of_mxcsr",
            "exceptions::mf_comes_at_the_next_waiting_instruction",
            "exceptions::mf_is_not_raised_by_non_waiting_instructions",
            "exceptions::nm_by_wait_needs_mp_and_ts",
            "exceptions::nm_by_x87_with_task_switched",
            "exceptions::ud_by_sse_without_osfxsr_and_avx_without_osxsave",
            "exceptions::ud_instead_of_xm_without_osxmmexcpt",
            "exceptions::xm_by_an_unmasked_sse_exception",
            "floating_point::an_sse_fault_does_not_change_its_destination",
            "floating_point::avx_needs_its_bit_of_xcr0",
            "floating_point::fxsave_and_fxrstor_give_everything_back",
            "floating_point::fxsave_needs_16_byte_alignment",
            "floating_point::memory_operands_across_pages",
            "floating_point::rounding_modes_are_the_guests",
            "floating_point::sse_instructions_leave_the_upper_half_and_vex_ones_clear_it",
            "floating_point::the_fxsave_image_has_the_fields_of_the_manual",
            "floating_point::the_x87_stack_survives_faults_and_port_accesses",
            "floating_point::xrstor_checks_its_header",
            "floating_point::xrstor_of_absent_components_initialises_them",
            "floating_point::xsave_and_xrstor_of_the_upper_halves",
            "floating_point::xsetbv_and_xgetbv",
        ],
    ),
    (
        "CMPXCHG16B, INVPCID, LAR, LSL, STAC, CLAC and SYSENTER are not emulated",
        &[
            "exceptions::sysenter_in_long_mode_follows_the_vendor",
            "multiprocessor::cmpxchg16b_is_atomic",
            "paging_rights::smap_refuses_user_data_at_level_0_unless_ac",
            "privilege::sysenter_and_sysexit_in_32_bit_mode",
            "remapping::bad_invpcid_operands",
            "remapping::invpcid_of_each_type_flushes",
            "remapping::invpcid_type_2_flushes_global_pages",
            "segmentation::lar_lsl_verr_verw",
        ],
    ),
    (
        "opcodes that 64-bit mode does not have end the VM instead of raising #UD",
        &["exceptions::ud_by_instructions_that_64_bit_mode_does_not_have"],
    ),
    (
        "interrupts are noticed only between batches of emulated instructions, not at the instruction that allows them",
        &[
            "interrupts::a_second_sti_does_not_prolong_the_shadow",
            "interrupts::cr8_holds_interrupts_back",
            "interrupts::interrupts_in_each_mode_push_frames_of_its_size",
            "interrupts::iret_has_no_shadow",
            "interrupts::mov_ss_shadows_one_instruction",
            "interrupts::pop_ss_shadows_one_instruction",
            "interrupts::popf_has_no_shadow",
            "interrupts::sti_shadows_one_instruction",
            "interrupts::the_highest_vector_comes_first",
        ],
    ),
    (
        "an exception or interrupt at level 0 to 2 of 32-bit protected mode, or at level 1, shuts the vCPU down",
        &[
            "exceptions::de_of_aam_by_zero",
            "interrupts::a_jump_to_itself_is_interrupted",
            "mode_switches::lma_appears_with_paging",
            "mode_switches::virtual_8086_mode_and_out_again",
            "paging_rights::pae_checks_the_directory_pointers_when_cr3_is_loaded",
            "paging_rights::pae_reserved_bits",
            "paging_rights::pae_tables_with_2_mib_pages_and_nx",
            "paging_rights::two_level_tables",
            "paging_rights::two_level_tables_with_4_mib_pages",
            "privilege::cpl_1_is_privileged_for_pages_but_not_for_instructions",
            "privilege::the_same_in_32_bit_mode",
        ],
    ),
    (
        "breakpoints and single steps are not raised in emulated code",
        &[
            "debugging::a_data_breakpoint_in_a_string_stops_it_there",
            "debugging::breakpoints_are_set_and_read_back_by_the_guest",
            "debugging::data_breakpoints_trap_after_the_access",
            "debugging::each_iteration_of_a_string_is_a_step",
            "debugging::mov_ss_delays_a_single_step",
        ],
    ),
    (
        "what is delivered while an event is being delivered is not what hardware delivers",
        &[
            "exceptions::a_fault_after_a_benign_one_is_delivered_instead",
            "exceptions::a_page_fault_while_a_page_fault_is_delivered_leaves_its_own_cr2",
            "exceptions::triple_fault_in_real_mode",
            "exceptions::ts_by_a_return_stack_that_is_no_stack",
            "exceptions::ts_with_the_selector_of_the_bad_stack",
            "paging_rights::smap_counts_for_implicit_accesses_whatever_ac_says",
        ],
    ),
    (
        "emulated accesses are not checked as by a CPU: canonical addresses, both pages before a store",
        &[
            "accesses::a_fault_on_the_second_page_has_its_address",
            "accesses::an_access_that_leaves_the_canonical_range",
        ],
    ),
    (
        "emulated read-modify-writes that cross pages are not atomic",
        &[
            "multiprocessor::locked_increments_across_pages",
            "multiprocessor::locked_increments_across_pages_and_inside_one",
        ],
    ),
    (
        "bad values of control registers and IA32_PAT are taken",
        &["exceptions::gp_by_bad_control_register_values", "privilege::msrs_check_their_values"],
    ),
    (
        "call gates, conforming code, 16-bit gates, SYSCALL, SYSRET, IOPL, POPF and IRET's checks are not a CPU's",
        &[
            "debugging::sysret_to_a_stepped_program_steps_at_once",
            "privilege::a_32_bit_call_gate_copies_parameters",
            "privilege::a_call_gate_checks_its_dpl",
            "privilege::a_call_gate_switches_the_stack_and_retf_comes_back",
            "privilege::conforming_code_runs_at_the_level_of_its_caller",
            "privilege::iopl_3_opens_all_ports_and_cli",
            "privilege::iret_to_64_bit_code_at_level_3_checks_the_frame",
            "privilege::popf_changes_if_and_iopl_only_where_allowed",
            "privilege::sixteen_bit_gates_push_words",
            "privilege::syscall_and_sysret",
            "privilege::syscall_needs_sce",
            "privilege::sysretl_goes_to_compatibility_mode",
        ],
    ),
    (
        "its CPUs have no PCIDs and no pages of 1 GiB (KVM_GET_SUPPORTED_CPUID)",
        &[
            "paging_rights::large_pages_of_four_level_tables",
            "remapping::a_pcid_that_is_kept_is_flushed_by_invpcid",
            "remapping::each_pcid_has_its_own_translations",
            "remapping::loading_cr3_with_a_pcid_flushes_that_pcid",
        ],
    ),
];

impl KvmHost {
    /// Looks at this host.
    pub fn look() -> Self {
        let root = Path::new("/");
        let kvm = Kvm::probe(root, Cpu::virtualization(root).virtualizes());
        match (kvm.problem, kvm.kind) {
            (Some(problem), _) => Self::None(problem),
            (None, Some(KvmKind::PageTables)) => Self::PageTables,
            (None, _) => Self::Hardware,
        }
    }

    /// Why the case at `place` (`FILE::CASE`) does not run on the kvm engine, if so.
    pub fn skips(&self, place: &str) -> Option<&str> {
        match self {
            Self::None(problem) => Some(problem),
            Self::Hardware => None,
            Self::PageTables => {
                PAGE_TABLES.iter().find(|(_, cases)| cases.contains(&place)).map(|(reason, _)| *reason)
            }
        }
    }
}

/// Whether the CPU has virtualization of its own.
pub fn kvm_is_hardware() -> bool {
    Cpu::virtualization(Path::new("/")).virtualizes()
}

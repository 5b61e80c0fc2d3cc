//! Every instruction form, with fixed seeds, on the soft engine and on the CPU itself.

use berth_tests_isa::case::CodeMode;
use berth_tests_isa::report::{CaseId, Factory, check};
use berth_tests_isa::runner::{Runner, Verdict};
use iced_x86::Code;

/// Cases of each form with its operands in registers, and as many with one in memory.
const CASES: u64 = 24;
/// Sequences in each test.
const SEQUENCES: u64 = 20_000;

/// Runs cases of `forms`; returns the number of forms with at least one compared case.
fn compare_forms(forms: &[Code], mode: CodeMode) -> usize {
    let mut runner = Runner::new().expect("this host can run cases");
    let factory = Factory::default();
    let mut failures = Vec::new();
    let mut compared = 0;
    for &code in forms {
        let mut decided = false;
        'form: for memory in [false, true] {
            for seed in 0..CASES {
                let id = CaseId { form: Some((code, memory)), mode, seed };
                let Some(case) = factory.make(&id) else { continue };
                match check(&mut runner, &id, &case) {
                    Ok(Verdict::Same(_)) => decided = true,
                    Ok(_) => {}
                    Err(text) => {
                        failures.push(text);
                        break 'form;
                    }
                }
            }
        }
        compared += usize::from(decided);
    }
    let shown: Vec<_> = failures.iter().take(25).cloned().collect();
    assert!(failures.is_empty(), "{} of {} forms differ:\n{}", failures.len(), forms.len(), shown.join("\n"));
    compared
}

fn compare_sequences(mode: CodeMode) {
    let mut runner = Runner::new().expect("this host can run cases");
    let factory = Factory::default();
    let mut failures = Vec::new();
    let mut to_the_end = 0;
    for seed in 0..SEQUENCES {
        let id = CaseId { form: None, mode, seed };
        let Some(case) = factory.make(&id) else { continue };
        match check(&mut runner, &id, &case) {
            Ok(Verdict::Same(vector)) => to_the_end += usize::from(vector == berth_cpu::bits::vector::BP),
            Ok(_) => {}
            Err(text) => failures.push(text),
        }
        if failures.len() >= 10 {
            break;
        }
    }
    assert!(failures.is_empty(), "sequences differ:\n{}", failures.join("\n"));
    assert!(
        to_the_end > SEQUENCES as usize / 2,
        "only {to_the_end} of {SEQUENCES} sequences came to their end"
    );
}

/// Runs a test of this file again with optimisations of the engine switched off.
fn again_with(soft: &str, test: &str) {
    let me = std::env::current_exe().expect("the test knows its own file");
    let status = std::process::Command::new(me).args(["--exact", test]).env("BERTH_SOFT", soft).status();
    assert!(status.expect("the test can be started").success(), "BERTH_SOFT={soft}: {test} fails");
}

#[test]
fn sequences_without_linked_blocks() {
    again_with("nochain", "sequences_of_64_bit_code");
}

#[test]
fn sequences_without_slots() {
    again_with("noslots", "sequences_of_64_bit_code");
}

#[test]
fn forms_without_slots() {
    again_with("noslots", "forms_of_64_bit_code");
}

#[test]
fn sequences_without_paired_calls() {
    again_with("nocalls", "sequences_of_64_bit_code");
}

#[test]
fn sequences_without_tlb() {
    again_with("nochain,notlb", "sequences_of_64_bit_code");
}

#[test]
fn forms_without_tlb() {
    again_with("notlb", "forms_of_64_bit_code");
}

#[test]
fn forms_that_the_guest_does_not_have_raise_ud() {
    let mut runner = Runner::new().expect("this host can run cases");
    let factory = Factory::default();
    let (mut checked, mut others) = (0, Vec::new());
    for code in factory.catalogue.missing() {
        for memory in [false, true] {
            let id = CaseId { form: Some((code, memory)), mode: CodeMode::Bits64, seed: 1 };
            let Some(case) = factory.make(&id) else { continue };
            let end = runner.soft_end(&case);
            checked += 1;
            if end != Ok((berth_cpu::bits::vector::UD, case.start())) {
                others.push((code, end));
            }
        }
    }
    assert!(others.is_empty(), "not #UD: {others:x?}");
    assert!(checked > 100, "only {checked} forms");
}

#[test]
fn forms_of_64_bit_code() {
    let forms = Factory::default().catalogue.compared(CodeMode::Bits64);
    let compared = compare_forms(&forms, CodeMode::Bits64);
    assert!(compared >= 2000, "only {compared} of {} forms were compared", forms.len());
}

#[test]
fn forms_of_32_bit_code() {
    let forms = Factory::default().catalogue.compared(CodeMode::Bits32);
    let compared = compare_forms(&forms, CodeMode::Bits32);
    assert!(compared >= 1750, "only {compared} of {} forms were compared", forms.len());
}

#[test]
fn sequences_of_64_bit_code() {
    compare_sequences(CodeMode::Bits64);
}

#[test]
fn sequences_of_32_bit_code() {
    compare_sequences(CodeMode::Bits32);
}

//! What to say when KVM cannot go on (api.rst 5, KVM_EXIT_FAIL_ENTRY and KVM_EXIT_INTERNAL_ERROR).

use std::fmt::Write;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_run,
};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;

/// For people: which error it is, the instruction's bytes where the kernel gives them, else its data.
pub fn internal_error(run: &kvm_run) -> String {
    // SAFETY: the exit reason says that this is the variant; all its fields are integers, valid whatever they are.
    let (suberror, ndata, data) = unsafe {
        let internal = &run.__bindgen_anon_1.internal;
        (internal.suberror, internal.ndata, internal.data)
    };
    if suberror == KVM_INTERNAL_ERROR_EMULATION {
        // SAFETY: with this suberror it is the variant; all its fields are integers.
        let failure = unsafe { &run.__bindgen_anon_1.emulation_failure };
        // SAFETY: the only variant of the inner union; all its fields are integers.
        let bytes = unsafe { &failure.__bindgen_anon_1.__bindgen_anon_1 };
        let given =
            ndata > 0 && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        let len = if given { usize::from(bytes.insn_size).min(MAX_INSTRUCTION) } else { 0 };
        return emulation_failure(&bytes.insn_bytes[..len]);
    }
    let what = match suberror {
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions came together that KVM cannot deliver",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "the delivery of an event caused an exit that KVM cannot handle",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the CPU left the guest for a reason that KVM does not know"
        }
        _ => "KVM reports an internal error",
    };
    let mut text = format!("{what} (internal error {suberror}");
    for word in data.iter().take(ndata as usize) {
        // Writing to a String cannot fail.
        let _ = write!(text, ", {word:#x}");
    }
    text.push(')');
    text
}

fn emulation_failure(bytes: &[u8]) -> String {
    let mut text = "the kernel's KVM cannot emulate an instruction of the guest".to_owned();
    if bytes.is_empty() {
        text.push_str(" (it does not say which; the code at RIP is below)");
    } else {
        let bytes: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        text.push_str(&format!(": {}", bytes.join(" ")));
    }
    text
}

/// For people: the CPU refused to enter the guest.
pub fn failed_entry(reason: u64, cpu: u32) -> String {
    format!("the CPU refuses to enter the guest: hardware reason {reason:#x} on host CPU {cpu}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_bytes_are_shown_where_the_kernel_has_them() {
        assert!(emulation_failure(&[0x0f, 0xc7, 0x0f]).ends_with(": 0f c7 0f"));
        assert!(emulation_failure(&[]).contains("at RIP"));
    }

    #[test]
    fn data_of_other_errors_are_shown_as_far_as_there_are_any() {
        let mut run = kvm_run::default();
        run.__bindgen_anon_1.internal.suberror = KVM_INTERNAL_ERROR_DELIVERY_EV;
        run.__bindgen_anon_1.internal.ndata = 2;
        run.__bindgen_anon_1.internal.data = [0x80, 0x31, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let text = internal_error(&run);
        assert!(text.ends_with("(internal error 3, 0x80, 0x31)"), "{text}");
        run.__bindgen_anon_1.internal.ndata = u32::MAX;
        assert!(internal_error(&run).contains(", 0x7, 0x0"));
    }
}

//! The instruction forms that are compared, and the list of those that are not, with the reason.

use iced_x86::{Code, EncodingKind, Mnemonic as M, OpCodeOperandKind as O};

use crate::case::CodeMode;

/// Why a form is not compared with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Excluded {
    /// Reads time, randomness, counters or the identity of the CPU.
    NotRepeatable,
    /// The host's kernel or hypervisor takes part: system calls, SGDT under UMIP, VMCALL, …
    KernelActs,
    /// Depends on descriptor tables, which are the host kernel's natively: segment loads, far transfers, LAR, ….
    DescriptorTables,
    /// Depends on which state the CPU tracks as used, and on XCR0 of the host.
    StateTracking,
    /// Vendors differ, or the hypervisor below the host does: INT1 under a hypervisor that intercepts #DB, PREFETCH
    /// with a register operand.
    ImplementationSpecific,
}

/// What to do with a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Compared with the host.
    Compared,
    /// Not compared.
    Excluded(Excluded),
    /// The guest's CPU does not have it, or it does not exist in this mode.
    Absent,
}

/// Features of the decoder that guests never see on the soft engine, but that some host may have, decide by
/// [`berth_engine_soft::FeatureSet`]; EVEX, XOP and 3DNow! have no place in the model at all.
fn has_encoding(code: Code) -> bool {
    matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
}

/// Instructions in the space of reserved NOPs (SDM volume 2, table A-3): NOPs on CPUs without their feature, and
/// without effect here on the others.
fn is_nop_space(code: Code) -> bool {
    matches!(
        code.mnemonic(),
        M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Cldemote
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
    )
}

fn exclusion(code: Code) -> Option<Excluded> {
    use Excluded::*;
    let kinds = code.op_code().op_kinds();
    if matches!(
        code,
        Code::Int1
            | Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some(ImplementationSpecific);
    }
    let loads_segment = matches!(code.mnemonic(), M::Mov | M::Pop)
        && matches!(kinds.first(), Some(O::seg_reg | O::es | O::cs | O::ss | O::ds | O::fs | O::gs));
    if loads_segment || kinds.iter().any(|k| matches!(k, O::farbr2_2 | O::farbr4_2)) {
        return Some(DescriptorTables);
    }
    Some(match code.mnemonic() {
        M::Rdtsc
        | M::Rdtscp
        | M::Rdrand
        | M::Rdseed
        | M::Rdpmc
        | M::Rdpid
        | M::Cpuid
        | M::Xgetbv
        | M::Rdpru => NotRepeatable,
        M::Syscall
        | M::Sysenter
        | M::Sysexit
        | M::Sysret
        | M::Sysexitq
        | M::Sysretq
        | M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Vmcall
        | M::Vmmcall => KernelActs,
        M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Retf => DescriptorTables,
        M::Jmp | M::Call
            if code.op_code().memory_size().info().is_packed()
                || matches!(
                    code,
                    Code::Jmp_m1616
                        | Code::Jmp_m1632
                        | Code::Jmp_m1664
                        | Code::Call_m1616
                        | Code::Call_m1632
                        | Code::Call_m1664
                ) =>
        {
            DescriptorTables
        }
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64 => StateTracking,
        _ => return None,
    })
}

/// What to do with `code` in `mode`. `features`: what the guest has.
pub fn kind(code: Code, mode: CodeMode, features: &berth_engine_soft::FeatureSet, amd: bool) -> Kind {
    let info = code.op_code();
    let decodes = match (mode, amd) {
        (CodeMode::Bits64, true) => info.mode64() && info.amd_decoder64(),
        (CodeMode::Bits64, false) => info.mode64() && info.intel_decoder64(),
        (CodeMode::Bits32, true) => info.mode32() && info.amd_decoder32(),
        (CodeMode::Bits32, false) => info.mode32() && info.intel_decoder32(),
    };
    let real = info.is_instruction() && code != Code::INVALID && !info.fwait();
    if !real || !decodes || info.decoder_option() != 0 || !has_encoding(code) {
        return Kind::Absent;
    }
    if !features.contains_all(code.cpuid_features()) && !is_nop_space(code) {
        return Kind::Absent;
    }
    match exclusion(code) {
        Some(reason) => Kind::Excluded(reason),
        None => Kind::Compared,
    }
}

/// What the guest of this host is, as far as forms depend on it.
pub struct Catalogue {
    features: berth_engine_soft::FeatureSet,
    amd: bool,
}

impl Default for Catalogue {
    fn default() -> Self {
        let model = berth_engine_soft::host_model(1, 1_000_000_000);
        Self {
            features: berth_engine_soft::FeatureSet::of(&model),
            amd: model.vendor() == berth_cpu::cpuid::Vendor::Amd,
        }
    }
}

impl Catalogue {
    /// Options of the decoder for this host.
    pub fn decoder_options(&self) -> u32 {
        if self.amd { iced_x86::DecoderOptions::AMD } else { iced_x86::DecoderOptions::NONE }
    }

    /// What to do with `code` in `mode`.
    pub fn kind(&self, code: Code, mode: CodeMode) -> Kind {
        kind(code, mode, &self.features, self.amd)
    }

    /// Every form that is compared in `mode`.
    pub fn compared(&self, mode: CodeMode) -> Vec<Code> {
        Code::values().filter(|&c| self.kind(c, mode) == Kind::Compared).collect()
    }

    /// Every form that is not compared in `mode`, with the reason.
    pub fn excluded(&self, mode: CodeMode) -> Vec<(Excluded, Code)> {
        let mut list: Vec<_> = Code::values()
            .filter_map(|c| match self.kind(c, mode) {
                Kind::Excluded(reason) => Some((reason, c)),
                _ => None,
            })
            .collect();
        list.sort_by_key(|&(reason, code)| (reason, code as u32));
        list
    }

    /// Forms of 64-bit code that exist on some CPU, but not on the guest's: they raise #UD. Not those that other
    /// CPUs execute as something else.
    pub fn missing(&self) -> Vec<Code> {
        let degrades = |c: Code| {
            c.op_code().is_reserved_nop()
                || is_nop_space(c)
                || matches!(c.mnemonic(), M::Lzcnt | M::Tzcnt | M::Wbnoinvd | M::Vmcall | M::Vmmcall)
        };
        Code::values()
            .filter(|&c| {
                let info = c.op_code();
                info.is_instruction() && c != Code::INVALID && info.mode64() && info.decoder_option() == 0
            })
            .filter(|&c| !self.features.contains_all(c.cpuid_features()) && !degrades(c))
            .collect()
    }

    /// The form with this name (as `{:?}` prints it).
    pub fn by_name(name: &str) -> Option<Code> {
        Code::values().find(|c| format!("{c:?}").eq_ignore_ascii_case(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_knows_what_to_compare() {
        let catalogue = Catalogue::default();
        let kind = |code| catalogue.kind(code, CodeMode::Bits64);
        assert_eq!(kind(Code::Add_rm32_r32), Kind::Compared);
        assert_eq!(kind(Code::Syscall), Kind::Excluded(Excluded::KernelActs));
        assert_eq!(kind(Code::Pushad), Kind::Absent);
        assert_eq!(catalogue.kind(Code::Pushad, CodeMode::Bits32), Kind::Compared);
        assert_eq!(kind(Code::EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er), Kind::Absent);
        assert_eq!(Catalogue::by_name("add_rm32_r32"), Some(Code::Add_rm32_r32));
    }
}

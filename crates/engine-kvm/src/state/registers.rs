//! General-purpose, segment, control and debug registers (api.rst 4.11 to 4.14, 4.33 and 4.34).

use berth_cpu::bits::gpr;
use berth_cpu::{CpuState, Segment, TableRegister};
use berth_engine::EngineError;
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::bad;
use super::sync::Synced;

/// Registers of KVM_SET_REGS.
pub fn general(state: &CpuState) -> kvm_regs {
    let r = &state.gpr;
    kvm_regs {
        rax: r[gpr::RAX],
        rbx: r[gpr::RBX],
        rcx: r[gpr::RCX],
        rdx: r[gpr::RDX],
        rsi: r[gpr::RSI],
        rdi: r[gpr::RDI],
        rsp: r[gpr::RSP],
        rbp: r[gpr::RBP],
        r8: r[gpr::R8],
        r9: r[gpr::R9],
        r10: r[gpr::R10],
        r11: r[gpr::R11],
        r12: r[gpr::R12],
        r13: r[gpr::R13],
        r14: r[gpr::R14],
        r15: r[gpr::R15],
        rip: state.rip,
        rflags: state.rflags,
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.attr >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attr & 0xf) as u8,
        s: bit(4),
        dpl: s.dpl(),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: u8::from(s.is_unusable()),
        padding: 0,
    }
}

fn from_segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u32| u16::from(value & 1) << n;
    let attr = u16::from(s.type_ & 0xf)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15);
    let unusable = s.unusable != 0 || s.present == 0;
    Segment { base: s.base, limit: s.limit, attr: if unusable { 0 } else { attr }, selector: s.selector }
}

/// Registers of KVM_SET_SREGS. CR8, which is the APIC's, comes from `current`; so does the APIC's base unless the
/// state has one.
pub fn special(state: &CpuState, current: &kvm_sregs) -> kvm_sregs {
    let table = |t: &TableRegister| kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] };
    let mut interrupt_bitmap = [0; 4];
    if let Some(vector) = state.pending.interrupt {
        interrupt_bitmap[usize::from(vector >> 6)] = 1 << (vector & 63);
    }
    kvm_sregs {
        cs: to_segment(&state.cs),
        ds: to_segment(&state.ds),
        es: to_segment(&state.es),
        fs: to_segment(&state.fs),
        gs: to_segment(&state.gs),
        ss: to_segment(&state.ss),
        tr: to_segment(&state.tr),
        ldt: to_segment(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: current.cr8,
        efer: state.efer,
        apic_base: state.apic.as_ref().map_or(current.apic_base, |apic| apic.base),
        interrupt_bitmap,
    }
}

/// Registers of KVM_SET_DEBUGREGS.
pub fn debug(state: &CpuState) -> kvm_debugregs {
    let [db0, db1, db2, db3, _, _, dr6, dr7] = state.dr;
    kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..kvm_debugregs::default() }
}

/// Takes over what KVM has of general-purpose, segment and control registers.
pub fn read(synced: &Synced, state: &mut CpuState) {
    let (r, s) = (&synced.regs, &synced.sregs);
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    (state.rip, state.rflags) = (r.rip, r.rflags);
    state.es = from_segment(&s.es);
    state.cs = from_segment(&s.cs);
    state.ss = from_segment(&s.ss);
    state.ds = from_segment(&s.ds);
    state.fs = from_segment(&s.fs);
    state.gs = from_segment(&s.gs);
    state.ldtr = from_segment(&s.ldt);
    state.tr = from_segment(&s.tr);
    state.gdtr = TableRegister { base: s.gdt.base, limit: s.gdt.limit };
    state.idtr = TableRegister { base: s.idt.base, limit: s.idt.limit };
    (state.cr0, state.cr2, state.cr3, state.cr4, state.efer) = (s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
}

/// Reads the debug registers.
pub fn read_debug(vcpu: &VcpuFd, state: &mut CpuState) -> Result<(), EngineError> {
    let d = vcpu.get_debug_regs().map_err(bad("debug registers"))?;
    let [db0, db1, db2, db3] = d.db;
    state.dr = [db0, db1, db2, db3, 0, 0, d.dr6, d.dr7];
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_there_and_back() {
        for attr in [0xc09b, 0xa09b, 0x0093, 0xc0f3, 0x008b, 0x0082, 0xd0ff] {
            let segment = Segment { base: 0x1234_5678_9abc, limit: 0xf_ffff, attr, selector: 0x2b };
            assert_eq!(from_segment(&to_segment(&segment)), segment, "{attr:#x}");
        }
        let null = Segment { base: 7, limit: 0, attr: 0, selector: 0 };
        assert_eq!(to_segment(&null).unusable, 1);
        assert_eq!(from_segment(&to_segment(&null)), null);
    }

    #[test]
    fn registers_are_in_encoding_order() {
        let mut state = CpuState::default();
        for (n, value) in state.gpr.iter_mut().zip(100..) {
            *n = value;
        }
        let r = general(&state);
        assert_eq!((r.rax, r.rcx, r.rdx, r.rbx, r.rsp), (100, 101, 102, 103, 104));
        assert_eq!((r.rdi, r.r8, r.r15), (107, 108, 115));
    }
}

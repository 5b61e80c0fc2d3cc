//! Instructions that translated code does not do itself, and the delivery of exceptions and interrupts.
//!
//! ```text
//!   translated code ──helper call──► execute() ──► one module a subject ──► Flow, or Fault
//!   run loop ──fault, interrupt───► deliver()  ──► IDT, stack switch ─────► next instruction is the handler's
//! ```
//!
//! Contract of every helper: on entry all guest state is exact and `cpu.s.rip` is the instruction's own address.
//! It checks everything first and commits last: when it returns a [`Fault`], the state is as before, except where
//! the SDM says otherwise (progress of repeated string instructions, gathers).

mod control;
pub mod deliver;
mod descriptor;
mod far;
pub mod features;
mod fpu;
mod frame;
mod gate;
mod io;
mod iret;
mod legacy;
pub mod msr;
mod msr_table;
pub mod operands;
pub mod pv;
mod segments;
mod stack;
mod string;
mod syscall;
mod system;
mod tables;
#[cfg(test)]
mod tests_support;
mod vector;

use iced_x86::{Instruction, Mnemonic as M};

use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};

/// Executes one instruction. `cpu.s.rip` is its address, and it was decoded with that address in the current
/// mode.
///
/// # Errors
/// The exception that the instruction raises; nothing was committed then. #UD for instructions that this CPU
/// does not have.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Guest<Flow> {
    match insn.mnemonic() {
        // Segment registers and descriptor tables.
        M::Mov if control::is_special_move(insn) => control::mov(cpu, insn),
        M::Mov => segments::mov(cpu, insn),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => segments::load_far_pointer(cpu, insn),
        M::Lar | M::Lsl | M::Verr | M::Verw => tables::inspect_selector(cpu, insn),
        M::Arpl => tables::arpl(cpu, insn),
        M::Lldt => tables::lldt(cpu, insn),
        M::Ltr => tables::ltr(cpu, insn),
        M::Sldt | M::Str => tables::store_selector(cpu, insn),
        M::Lgdt | M::Lidt => tables::load_table(cpu, insn),
        M::Sgdt | M::Sidt => tables::store_table(cpu, insn),

        // Transfers of control.
        M::Jmp => far::jmp(cpu, insn),
        M::Call => far::call(cpu, insn),
        M::Ret => far::ret_near(cpu, insn),
        M::Retf => far::ret_far(cpu, insn),
        M::Iret | M::Iretd | M::Iretq => iret::iret(cpu, insn),
        M::Syscall => syscall::syscall(cpu, insn),
        M::Sysret | M::Sysretq => syscall::sysret(cpu, insn),
        M::Sysenter => syscall::sysenter(cpu),
        M::Sysexit | M::Sysexitq => syscall::sysexit(cpu, insn),
        M::Int | M::Int3 | M::Int1 | M::Into => deliver::software_interrupt(cpu, insn),
        M::Bound => legacy::bound(cpu, insn),
        M::Ud0 | M::Ud1 | M::Ud2 => Err(Fault::ud()),

        // The stack.
        M::Push => stack::push(cpu, insn),
        M::Pop => stack::pop(cpu, insn),
        M::Pushf | M::Pushfd | M::Pushfq => stack::pushf(cpu, insn),
        M::Popf | M::Popfd | M::Popfq => stack::popf(cpu, insn),
        M::Pusha | M::Pushad => stack::pusha(cpu, insn),
        M::Popa | M::Popad => stack::popa(cpu, insn),
        M::Enter => stack::enter(cpu, insn),
        M::Leave => stack::leave(cpu, insn),

        // Control registers, MSRs, the hypervisor.
        M::Clts => control::clts(cpu),
        M::Lmsw => control::lmsw(cpu, insn),
        M::Smsw => control::smsw(cpu, insn),
        M::Xgetbv => control::xgetbv(cpu),
        M::Xsetbv => control::xsetbv(cpu),
        M::Cpuid => system::cpuid(cpu),
        M::Rdtsc | M::Rdtscp => system::rdtsc(cpu, insn),
        M::Rdpid => system::rdpid(cpu, insn),
        M::Rdpmc => system::rdpmc(),
        M::Invd | M::Wbinvd | M::Wbnoinvd => system::invalidate_caches(cpu),
        M::Invlpg => system::invlpg(cpu, insn),
        M::Invpcid => system::invpcid(cpu, insn),
        M::Hlt => system::hlt(cpu),
        M::Pause => pv::pause(cpu),
        M::Stac | M::Clac => system::set_ac(cpu, insn),
        M::Swapgs => system::swapgs(cpu),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => system::segment_base(cpu, insn),
        M::Rdmsr => system::rdmsr(cpu),
        M::Wrmsr => system::wrmsr(cpu),
        M::Vmcall | M::Vmmcall => pv::hypercall(cpu),
        M::In => io::input(cpu, insn),
        M::Out => io::output(cpu, insn),

        // x87, SSE and AVX state; masked vector accesses.
        M::Fxsave | M::Fxsave64 => fpu::fxsave(cpu, insn),
        M::Fxrstor | M::Fxrstor64 => fpu::fxrstor(cpu, insn),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
            fpu::xsave(cpu, insn)
        }
        M::Xrstor | M::Xrstor64 => fpu::xrstor(cpu, insn),
        M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave => fpu::store_environment(cpu, insn),
        M::Fldenv | M::Frstor => fpu::load_environment(cpu, insn),
        M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq
        | M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd => vector::gather(cpu, insn),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => vector::masked_move(cpu, insn),
        M::Maskmovdqu | M::Vmaskmovdqu => vector::maskmovdqu(cpu, insn),
        M::Maskmovq => vector::maskmovq(cpu, insn),

        // Strings.
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => string::movs(cpu, insn),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => string::stos(cpu, insn),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => string::lods(cpu, insn),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => string::cmps(cpu, insn),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => string::scas(cpu, insn),
        M::Insb | M::Insw | M::Insd => string::ins(cpu, insn),
        M::Outsb | M::Outsw | M::Outsd => string::outs(cpu, insn),

        // Decimal arithmetic, flags, tables.
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das => legacy::decimal(cpu, insn),
        M::Salc => legacy::salc(cpu),
        M::Xlatb => legacy::xlat(cpu, insn),
        M::Cli => legacy::cli(cpu),
        M::Sti => legacy::sti(cpu),

        _ => Err(Fault::ud()),
    }
}

//! RDMSR and WRMSR (SDM volume 2; volume 4). The registers themselves are lines in [`super::msr_table`].
//!
//! Registers of the local APIC belong to it. Unknown registers raise #GP(0), as on hardware, and are logged
//! once each.

use std::arch::x86_64::_rdtsc;

use berth_cpu::ApicState;
use berth_cpu::bits::{cr0, efer};
use berth_cpu::cpuid::{CpuidModel, Feature};
use berth_cpu::msr as n;

use super::msr_table::{Entry, Kind, TABLE};
use super::pv;
use crate::code::Flow;
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::Flush;

/// EFER.AIBRSE: automatic IBRS (AMD64 APM volume 2, 3.1.7). It can be set and changes nothing.
const EFER_AUTO_IBRS: u64 = 1 << 21;
/// How many unknown registers are logged.
const MAX_REPORTED: usize = 64;

/// The model-specific registers of one vCPU that no translated code uses.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub spec_ctrl: u64,
    /// Guest time-stamp counter minus the host's, modulo 2^64.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    /// State of the paravirtual interface.
    pub pv: pv::Pv,
    /// Values of [`Kind::Stored`] registers, at the index of their line in the table.
    stored: Box<[u64]>,
    /// Unknown registers that were logged.
    reported: Vec<u32>,
}

impl Default for Msrs {
    fn default() -> Self {
        Self::new()
    }
}

impl Msrs {
    /// The values after reset (SDM volume 3, table 10-1).
    pub fn new() -> Self {
        let reset = |e: &Entry| if let Kind::Stored(value, _) = e.kind { value } else { 0 };
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            spec_ctrl: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pv: pv::Pv::default(),
            stored: TABLE.iter().map(reset).collect(),
            reported: Vec::new(),
        }
    }

    /// The guest's time-stamp counter now.
    pub fn tsc(&self) -> u64 {
        // SAFETY: every x86-64 CPU has RDTSC, and user code may execute it on every host that Berth supports.
        unsafe { _rdtsc() }.wrapping_add(self.tsc_offset)
    }
}

/// #GP(0) unless `ok`.
pub(super) fn require(ok: bool) -> Guest<()> {
    if ok { Ok(()) } else { Err(Fault::gp(0)) }
}

fn is_apic(number: u32) -> bool {
    matches!(number, n::X2APIC_FIRST..=n::X2APIC_LAST | n::IA32_APIC_BASE)
}

/// The line of register `number` and its index, if this CPU has the register.
fn find(model: &CpuidModel, number: u32) -> Option<(usize, &'static Entry)> {
    let first = TABLE.partition_point(|e| e.number < number);
    TABLE[first..]
        .iter()
        .enumerate()
        .take_while(|(_, e)| e.number == number)
        .find(|(_, e)| e.exists.on(model))
        .map(|(i, e)| (first + i, e))
}

/// #GP(0) for a register that does not exist.
fn unknown(cpu: &mut Cpu, number: u32, access: &str) -> Fault {
    let reported = &mut cpu.msrs.reported;
    if reported.len() < MAX_REPORTED && !reported.contains(&number) {
        reported.push(number);
        tracing::debug!("vCPU {}: {access} of unknown MSR {number:#x} raises #GP", cpu.id);
    }
    Fault::gp(0)
}

/// Reads register `number` without any check of privilege.
///
/// # Errors
/// #GP(0) for registers that do not exist or cannot be read.
pub fn read(cpu: &mut Cpu, number: u32) -> Guest<u64> {
    if is_apic(number) {
        return cpu.apic.read_msr(number).map_err(|_| Fault::gp(0));
    }
    if number == n::IA32_TSC_DEADLINE && cpu.vm.cpuid.has(Feature::TscDeadline) {
        return read_deadline(cpu);
    }
    let Some((index, entry)) = find(&cpu.vm.cpuid, number) else { return Err(unknown(cpu, number, "read")) };
    match entry.kind {
        Kind::Constant(value) | Kind::Quiet(value) => Ok(value),
        Kind::Field(field, _) => Ok(*field(&mut cpu.msrs)),
        Kind::Stored(..) => Ok(cpu.msrs.stored[index]),
        Kind::Special { read, .. } => read(cpu),
    }
}

/// Writes register `number` without any check of privilege.
///
/// # Errors
/// #GP(0) for registers that do not exist or cannot be written, and values that they do not take.
pub fn write(cpu: &mut Cpu, number: u32, value: u64) -> Guest<Flow> {
    if is_apic(number) {
        // The end of an interrupt, a lower task priority or a self-IPI may make an interrupt deliverable.
        return cpu.apic.write_msr(number, value).map(|()| Flow::Leave).map_err(|_| Fault::gp(0));
    }
    if number == n::IA32_TSC_DEADLINE && cpu.vm.cpuid.has(Feature::TscDeadline) {
        return write_deadline(cpu, value).map(|()| Flow::Next);
    }
    let Some((index, entry)) = find(&cpu.vm.cpuid, number) else { return Err(unknown(cpu, number, "write")) };
    let phys_mask = cpu.vm.phys_mask;
    match entry.kind {
        Kind::Constant(_) => return Err(Fault::gp(0)),
        Kind::Quiet(_) => {}
        Kind::Field(field, check) => {
            require(check.allows(value, phys_mask))?;
            *field(&mut cpu.msrs) = value;
        }
        Kind::Stored(_, check) => {
            require(check.allows(value, phys_mask))?;
            cpu.msrs.stored[index] = value;
        }
        Kind::Special { write, .. } => {
            write(cpu, value)?;
            return Ok(Flow::Leave);
        }
    }
    Ok(Flow::Next)
}

/// Every register that has a value of its own, for snapshots: number and value. EFER and the bases of FS and GS
/// are elsewhere in the CPU state, and the local APIC's registers are its own.
pub fn save(cpu: &mut Cpu) -> Vec<(u32, u64)> {
    let elsewhere = [n::IA32_EFER, n::IA32_FS_BASE, n::IA32_GS_BASE, n::IA32_PRED_CMD];
    // One number stands for both of KVM's clock registers; writing the wall clock is a command.
    let commands = [n::KVM_WALL_CLOCK, n::KVM_SYSTEM_TIME, n::KVM_WALL_CLOCK_NEW, n::IA32_TSC_ADJUST];
    let mut list = Vec::new();
    for entry in TABLE {
        let has_value = matches!(entry.kind, Kind::Field(..) | Kind::Stored(..) | Kind::Special { .. });
        if has_value
            && entry.exists.on(&cpu.vm.cpuid)
            && !elsewhere.contains(&entry.number)
            && !commands.contains(&entry.number)
            && let Ok(value) = read(cpu, entry.number)
        {
            list.push((entry.number, value));
        }
    }
    list
}

/// Writes what [`save`] of this or another engine returned. The caller restores guest memory first. Registers that
/// this CPU model does not have are left out, unless guests depend on them and use them.
///
/// # Errors
/// The number of the first register that does not take its value.
pub fn restore(cpu: &mut Cpu, list: &[(u32, u64)]) -> Result<(), u32> {
    for &(number, value) in list {
        if write(cpu, number, value).is_err() && n::is_essential(number) && value != 0 {
            return Err(number);
        }
    }
    Ok(())
}

/// The local APIC's registers, with the deadline as the guest counts.
pub fn save_apic(cpu: &Cpu) -> ApicState {
    let mut apic = cpu.apic.state();
    apic.tsc_deadline = read_deadline(cpu).unwrap_or(0);
    apic
}

/// Writes what [`save_apic`] returned; the time-stamp counter is restored before.
pub fn restore_apic(cpu: &Cpu, apic: &ApicState) {
    cpu.apic.set_state(&ApicState { tsc_deadline: host_deadline(cpu, apic.tsc_deadline), ..apic.clone() });
}

pub(super) fn no_read(_: &mut Cpu) -> Guest<u64> {
    Err(Fault::gp(0))
}

/// IA32_PRED_CMD: bit 0 is an indirect branch prediction barrier, which translated code does not need.
pub(super) fn write_pred_cmd(_: &mut Cpu, value: u64) -> Guest<()> {
    require(value & !1 == 0)
}

pub(super) fn read_tsc(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.msrs.tsc())
}

/// A write moves IA32_TSC_ADJUST by the same amount (SDM volume 3, 17.17.3).
pub(super) fn write_tsc(cpu: &mut Cpu, value: u64) -> Guest<()> {
    move_tsc(cpu, value.wrapping_sub(cpu.msrs.tsc()));
    Ok(())
}

pub(super) fn read_tsc_adjust(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.msrs.tsc_adjust)
}

pub(super) fn write_tsc_adjust(cpu: &mut Cpu, value: u64) -> Guest<()> {
    move_tsc(cpu, value.wrapping_sub(cpu.msrs.tsc_adjust));
    Ok(())
}

/// Moves the guest's time-stamp counter. The local APIC compares its deadline with the host's counter, and the
/// paravirtual clock refers to the guest's: both follow.
fn move_tsc(cpu: &mut Cpu, delta: u64) {
    if delta == 0 {
        return;
    }
    cpu.msrs.tsc_adjust = cpu.msrs.tsc_adjust.wrapping_add(delta);
    let deadline = read_deadline(cpu).unwrap_or(0);
    cpu.msrs.tsc_offset = cpu.msrs.tsc_offset.wrapping_add(delta);
    if deadline != 0 {
        // Fails only where the read above already gave nothing.
        let _ = write_deadline(cpu, deadline);
    }
    pv::clock_moved(cpu);
}

/// The deadline as the guest counts; 0 is "not armed" for both.
fn read_deadline(cpu: &Cpu) -> Guest<u64> {
    let host = cpu.apic.read_msr(n::IA32_TSC_DEADLINE).map_err(|_| Fault::gp(0))?;
    Ok(if host == 0 { 0 } else { host.wrapping_add(cpu.msrs.tsc_offset) })
}

fn write_deadline(cpu: &Cpu, value: u64) -> Guest<()> {
    cpu.apic.write_msr(n::IA32_TSC_DEADLINE, host_deadline(cpu, value)).map_err(|_| Fault::gp(0))
}

/// The deadline as the local APIC counts, in ticks of the host's counter.
fn host_deadline(cpu: &Cpu, value: u64) -> u64 {
    if value == 0 { 0 } else { value.wrapping_sub(cpu.msrs.tsc_offset).max(1) }
}

pub(super) fn read_efer(cpu: &mut Cpu) -> Guest<u64> {
    Ok(cpu.s.efer)
}

/// IA32_EFER (SDM volume 3, 2.2.1): LMA cannot be written, LME not changed while paging is on.
pub(super) fn write_efer(cpu: &mut Cpu, value: u64) -> Guest<()> {
    let auto_ibrs = if cpu.vm.cpuid.has(Feature::AutoIbrs) { EFER_AUTO_IBRS } else { 0 };
    let known = efer::SCE | efer::LME | efer::LMA | efer::NXE | auto_ibrs;
    let old = cpu.s.efer;
    let changed = old ^ value;
    require(value & !known == 0)?;
    require(changed & efer::LME == 0 || cpu.s.cr0 & cr0::PG == 0)?;
    cpu.s.efer = value & !efer::LMA | old & efer::LMA;
    if changed & efer::NXE != 0 {
        cpu.flush_tlb(Flush::All);
    }
    cpu.mode_changed();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::msr_table::Check;
    use super::*;

    #[test]
    fn the_table_is_in_ascending_order() {
        assert!(TABLE.windows(2).all(|w| w[0].number <= w[1].number));
    }

    #[test]
    fn reset_values_are_values_that_the_registers_take() {
        for entry in TABLE {
            if let Kind::Stored(reset, check) = entry.kind {
                assert!(check.allows(reset, (1 << 46) - 1), "{:#x}", entry.number);
            }
        }
    }

    #[test]
    fn memory_types_are_checked_in_every_byte() {
        let mask = (1 << 46) - 1;
        assert!(Check::PatTypes.allows(0x0706_0504_0100_0706, mask));
        assert!(!Check::PatTypes.allows(0x0206_0504_0100_0706, mask));
        assert!(!Check::MtrrTypes.allows(0x07, mask));
        assert!(Check::MtrrBase.allows(0x8000_0006, mask));
        assert!(!Check::MtrrBase.allows(0x8000_0106, mask));
        assert!(!Check::MtrrBase.allows(1 << 46, mask));
        assert!(Check::MtrrDefault.allows(0xc06, mask));
        assert!(!Check::MtrrDefault.allows(0xc02, mask));
    }

    #[test]
    fn a_new_cpu_has_reset_values() {
        let m = Msrs::new();
        let stored = |number: u32| m.stored[TABLE.iter().position(|e| e.number == number).unwrap()];
        assert_eq!(stored(n::IA32_PAT), 0x0007_0406_0007_0406);
        assert_eq!(stored(n::IA32_MTRR_DEF_TYPE), 0x806);
        assert_eq!((m.tsc_offset, m.star), (0, 0));
    }
}

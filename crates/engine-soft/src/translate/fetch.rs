//! Finds or makes the block for the current instruction: fetches bytes, decodes, and puts the result into the
//! cache.

use berth_memory::GuestPhysAddr;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Register};

use super::class::{Class, classify};
use super::emit::Emitter;
use crate::code::block::Found;
use crate::code::cache::{Full, Key};
use crate::cpu::Cpu;
use crate::fault::{Fault, Guest};
use crate::memory::{Access, Rights};
use crate::mode::Mode;
use crate::state::{JUMP_CACHE_ENTRIES, JumpCacheEntry, Seg};

/// Most instructions in a block.
const MAX_INSTRUCTIONS: usize = 48;
/// Longest x86 instruction in bytes.
pub(super) const MAX_INSTRUCTION_LEN: usize = 15;

/// Why there is no block.
#[derive(Debug)]
pub(crate) enum BlockError {
    /// Fetching raised an exception.
    Fault(Fault),
    /// The cache is full.
    Full,
    /// Code outside of RAM.
    NotRam(GuestPhysAddr),
}

impl From<Fault> for BlockError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Index in the jump cache for a RIP.
pub(crate) fn jump_cache_index(rip: u64) -> usize {
    ((rip ^ rip >> 12) as usize) & (JUMP_CACHE_ENTRIES - 1)
}

impl Cpu {
    /// The block for the current RIP in `mode` (the vCPU's own, perhaps with [`Mode::SINGLE`]).
    pub(crate) fn find_block(&mut self, mode: Mode) -> Result<Found, BlockError> {
        let rip = self.s.rip;
        let lin = self.linear(Seg::Cs, rip, 1, Access::Execute)?;
        let rights = Rights::of(mode);
        let t = self.translate(lin, Access::Execute, rights)?;
        let key = Key { gpa: t.gpa | lin & 0xfff, lin, rip, mode };
        let mut found = self.vm.cache.find(&key);
        if let Some(second) = found.and_then(|f| f.second_page) {
            // The second page is not part of the key.
            let now = self.translate(next_page(lin, mode), Access::Execute, rights)?;
            if now.gpa != second {
                found = None;
            }
        }
        let found = match found {
            Some(found) => found,
            None => {
                let began = crate::host::ticks();
                let made = self.translate_block(key);
                self.counters().translation_ticks.add(crate::host::ticks() - began);
                made?
            }
        };
        if chained(mode) {
            self.note_code_page(lin, t.global);
            if found.second_page.is_some() {
                let next = next_page(lin, mode);
                let global = self.translate(next, Access::Execute, rights)?.global;
                self.note_code_page(next, global);
            }
            let entry = self.vm.cache.address(found.entry_memory);
            let key = self.s.jump_key;
            let first = &mut self.s.jump_cache[jump_cache_index(rip)];
            let old = std::mem::replace(first, JumpCacheEntry { va: rip, key, entry, reserved: 0 });
            if (old.va, old.key) != (rip, key) && old.key != 0 {
                self.s.jump_cache[jump_cache_index(rip) ^ 1] = old;
            }
        }
        Ok(found)
    }

    /// Marks the page at `addr` as holding code before it is read, so that stores to it are noticed from now on.
    fn begin_code(&mut self, addr: GuestPhysAddr) {
        let marking = self.vm.marking.lock();
        let (new, others) = self.vm.code_pages.mark(addr, self.id);
        if new && others {
            // They may store to the page until they have seen the request; each of them compares the page with
            // what was translated from it when it has (`Cpu::sweep`).
            self.vm.sweep_others(self.id, addr);
        }
        drop(marking);
        if new && let Some(host) = self.vm.host_map.host(addr.page_base()) {
            self.drop_write_entries(host);
        }
        if self.vm.vcpus > 1 {
            self.vm.wait_for_sweeps(self.id, addr);
        }
    }

    fn fetch(&self, addr: GuestPhysAddr, out: &mut [u8]) -> Result<(), BlockError> {
        self.vm.memory.read(addr, out).map_err(|_| BlockError::NotRam(addr))
    }

    fn translate_block(&mut self, key: Key) -> Result<Found, BlockError> {
        loop {
            let first = GuestPhysAddr(key.gpa);
            if self.vm.host_map.host(first).is_none() {
                return Err(BlockError::NotRam(first));
            }
            self.begin_code(first);
            let version = self.vm.code_pages.version(first);
            let room = (4096 - (key.lin & 0xfff)) as usize;
            let single = key.mode.has(Mode::SINGLE) || key.mode.has(Mode::WATCHED);
            let most = if single { 1 } else { MAX_INSTRUCTIONS };
            let mut bytes = [0; 4096 + MAX_INSTRUCTION_LEN];
            let len = room.min(most * MAX_INSTRUCTION_LEN);
            self.fetch(first, &mut bytes[..len])?;

            let mut second = None;
            let mut list = self.decode(&bytes[..len], key, most);
            if list.is_empty() && len == room {
                // The first instruction crosses into the next page.
                let t =
                    self.translate(next_page(key.lin, key.mode), Access::Execute, Rights::of(key.mode))?;
                let addr = GuestPhysAddr(t.gpa);
                self.begin_code(addr);
                second = Some((addr, self.vm.code_pages.version(addr)));
                self.fetch(addr, &mut bytes[len..len + MAX_INSTRUCTION_LEN])?;
                list = self.decode(&bytes[..len + MAX_INSTRUCTION_LEN], key, 1);
            }
            let Some(&(last, _)) = list.last() else {
                return Err(BlockError::Fault(Fault::gp(0)));
            };
            let source_len = (last.ip().wrapping_sub(key.rip)) as usize + last.len();
            if list.len() == 1 {
                // CS limit, and the canonical boundary; longer blocks end before an instruction that violates it.
                self.linear(Seg::Cs, key.rip, source_len, Access::Execute)?;
            }
            let mut asm = std::mem::take(&mut self.asm);
            let source = bytes[..source_len].into();
            let mut draft = Emitter::new(&mut asm, key, &self.vm).block(&list, source);
            draft.second_page = second.map(|(addr, _)| addr.0).filter(|_| source_len > room);
            let vm = &self.vm;
            let result = vm.cache.insert(&mut asm, draft, || {
                let unchanged =
                    |addr, version| vm.code_pages.has_code(addr) && vm.code_pages.version(addr) == version;
                unchanged(first, version) && second.is_none_or(|(addr, v)| unchanged(addr, v))
            });
            self.asm = asm;
            match result {
                Ok(Some(found)) => return Ok(found),
                // Somebody wrote to the page meanwhile.
                Ok(None) => {}
                Err(Full) => return Err(BlockError::Full),
            }
        }
    }

    /// Decodes up to `most` instructions. Empty if not even the first is complete.
    fn decode(&self, bytes: &[u8], key: Key, most: usize) -> Vec<(Instruction, Class)> {
        let mode = key.mode;
        let mut decoder = Decoder::with_ip(mode.bitness(), bytes, key.rip, decoder_options(&self.vm));
        let mut list = Vec::with_capacity(16);
        while list.len() < most && decoder.can_decode() {
            let mut insn = decoder.decode();
            let prefix = insn.segment_prefix();
            if mode.is_64bit() && matches!(prefix, Register::ES | Register::CS | Register::SS | Register::DS)
            {
                // Ignored, also for which exception a bad address raises (SDM volume 1, 3.3.7).
                insn.set_segment_prefix(Register::None);
            }
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let in_limit = list.is_empty()
                || !mode.has(Mode::SEGMENTED)
                || self.linear(Seg::Cs, insn.ip(), insn.len(), Access::Execute).is_ok();
            if !in_limit {
                break;
            }
            let class = match self.is_available(&insn, mode) {
                Ok(()) => classify(&insn, mode),
                Err(fault) => Class::Unavailable(fault),
            };
            list.push((insn, class));
            let ends = class.ends_block() && !(class == Class::JumpIf && self.goes_on_after(&insn, mode));
            if ends || list.len() > 1 && list[list.len() - 2].1 == Class::Sti {
                break;
            }
        }
        end_after_sti(&mut list);
        list
    }

    /// Whether a block goes on after a conditional jump that is not taken: then neither a jump nor a new place for the
    /// flags is needed there. Not after the end of a loop, which is seldom where the time goes.
    fn goes_on_after(&self, jump: &Instruction, mode: Mode) -> bool {
        chained(mode)
            && !self.vm.debug.no_super
            && !self.vm.debug.no_chain
            && jump.near_branch_target() > jump.ip()
    }

    /// Whether the CPU model has the instruction and the mode lets it execute.
    ///
    /// # Errors
    /// #UD or #NM.
    pub(crate) fn is_available(&self, insn: &Instruction, mode: Mode) -> Guest<()> {
        use berth_cpu::bits::vector;
        use iced_x86::CpuidFeature as F;
        use iced_x86::EncodingKind;
        let features = insn.cpuid_features();
        if insn.is_invalid() && insn.len() >= MAX_INSTRUCTION_LEN {
            // The decoder stopped at the longest length: more bytes than that are #GP, whatever they say.
            return Err(Fault::gp(0));
        }
        if insn.is_invalid() || !self.vm.features.allows(insn) {
            return Err(Fault::ud());
        }
        let nm = || Fault::plain(vector::NM);
        if insn.mnemonic() == iced_x86::Mnemonic::Wait {
            return if mode.has(Mode::WAIT_NM) { Err(nm()) } else { Ok(()) };
        }
        let has = |wanted: &[F]| features.iter().any(|f| wanted.contains(f));
        if has(&[F::FPU, F::FPU287, F::FPU387, F::FPU287XL_ONLY]) {
            return if mode.has(Mode::FPU_OFF) { Err(nm()) } else { Ok(()) };
        }
        let vector_operand = (0..insn.op_count()).any(|i| {
            let r = insn.op_register(i);
            r.is_xmm() || r.is_ymm() || r.is_zmm() || r.is_mm()
        });
        let control = matches!(
            insn.mnemonic(),
            iced_x86::Mnemonic::Ldmxcsr
                | iced_x86::Mnemonic::Stmxcsr
                | iced_x86::Mnemonic::Vldmxcsr
                | iced_x86::Mnemonic::Vstmxcsr
                | iced_x86::Mnemonic::Emms
                | iced_x86::Mnemonic::Vzeroupper
                | iced_x86::Mnemonic::Vzeroall
        );
        let is_vex = insn.encoding() == EncodingKind::VEX;
        if !vector_operand && !control {
            // General-purpose VEX instructions (BMI) need protected mode, which the decoder cannot see.
            return if is_vex && (!mode.has(Mode::PROTECTED) || mode.has(Mode::V86)) {
                Err(Fault::ud())
            } else {
                Ok(())
            };
        }
        let mmx = has(&[F::MMX]) && !has(&[F::SSE, F::SSE2, F::SSSE3]);
        let exists = if is_vex {
            mode.has(Mode::AVX) && !mode.has(Mode::V86)
        } else if mmx {
            self.s.cr0 & berth_cpu::bits::cr0::EM == 0
        } else {
            mode.has(Mode::SSE)
        };
        if !exists {
            return Err(Fault::ud());
        }
        if mode.has(Mode::TASK_SWITCHED) { Err(nm()) } else { Ok(()) }
    }
}

/// STI is inline only if one ordinary instruction follows it in the block, after which the block ends with a
/// test for interrupts. Otherwise a helper executes it and the run loop does the rest.
fn end_after_sti(list: &mut Vec<(Instruction, Class)>) {
    let Some(at) = list.iter().position(|(_, class)| *class == Class::Sti) else { return };
    let follower = list.get(at + 1).map(|(_, class)| *class);
    if follower.is_none_or(|class| class.ends_block() || class == Class::Sti) {
        list[at].1 = Class::HelperEnd;
        list.truncate(at + 1);
    }
}

/// AMD and Intel decode a few encodings differently; the guest has the host's vendor.
fn decoder_options(vm: &crate::vm::Vm) -> u32 {
    if vm.is_amd { DecoderOptions::AMD } else { DecoderOptions::NONE }
}

fn next_page(lin: u64, mode: Mode) -> u64 {
    let next = (lin & !0xfff).wrapping_add(4096);
    if mode.is_64bit() { next } else { next & 0xffff_ffff }
}

/// Whether blocks of this mode are linked to each other and found through the jump cache. In the others each
/// block returns to the run loop, which checks segments and breakpoints.
pub(crate) fn chained(mode: Mode) -> bool {
    !(mode.has(Mode::SEGMENTED) || mode.has(Mode::SINGLE) || mode.has(Mode::WATCHED))
}

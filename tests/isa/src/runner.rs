//! Runs cases on both sides, and finds the smallest part of a case that differs.

use std::time::Duration;

use iced_x86::{Formatter, GasFormatter};

use crate::case::{Case, CodeMode, Item, NoOutcome, Target};
use crate::compare::{Difference, differences};
use crate::flow::reads_undefined;
use crate::layout::Image;
use crate::native::{Native, NativeError, TIMEOUT};
use crate::soft::{Soft, SoftError};

/// Cases cannot be run on this host.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The native side.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// The soft engine's side.
    #[error(transparent)]
    Soft(#[from] SoftError),
}

/// What came out of a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The same on both sides, with this exception vector.
    Same(u8),
    /// Not the same.
    Different(Vec<Difference>),
    /// The host itself does not give the same outcome twice, or none: nothing to compare with.
    Undecided(String),
}

/// Both sides.
pub struct Runner {
    native: Native,
    soft: Soft,
    pristine: Image,
}

impl Runner {
    /// Starts both sides.
    ///
    /// # Errors
    /// [`RunnerError`] when the host cannot run one of them.
    pub fn new() -> Result<Self, RunnerError> {
        // The child is a copy of this process: better made before the engine's threads and signal handlers.
        let native = Native::new()?;
        Ok(Self { native, soft: Soft::new()?, pristine: Image::pristine() })
    }

    fn image(&self, case: &Case) -> Image {
        let mut image = self.pristine.clone();
        for (addr, data) in &case.patches {
            // Code is what the case says, nothing else.
            if !(crate::layout::CODE..crate::layout::CODE + crate::layout::CODE_LEN).contains(addr) {
                image.patch(*addr, data);
            }
        }
        image.patch(case.start(), &case.code.bytes);
        image
    }

    /// Executes `case` on both sides and compares.
    pub fn check(&mut self, case: &Case) -> Verdict {
        let image = self.image(case);
        let native = match self.native.run(case, &image) {
            Ok(native) => native,
            Err(e) => return Verdict::Undecided(format!("natively: {e}")),
        };
        let soft = match self.soft.run(case, &image) {
            Ok(soft) => soft,
            Err(e) => {
                let end = format!("vector {} at {:#x}", native.vector, native.rip);
                return Verdict::Different(vec![Difference {
                    what: "end".into(),
                    native: end,
                    soft: e.to_string(),
                }]);
            }
        };
        let list = differences(case, &native, &soft);
        if list.is_empty() {
            return Verdict::Same(native.vector);
        }
        match self.native.run(case, &image) {
            Ok(again) if differences(case, &native, &again).is_empty() => Verdict::Different(list),
            _ => Verdict::Undecided("natively: not the same outcome twice".into()),
        }
    }

    /// Executes `case` on the soft engine alone: exception vector and RIP.
    ///
    /// # Errors
    /// [`NoOutcome`].
    pub fn soft_end(&mut self, case: &Case) -> Result<(u8, u64), NoOutcome> {
        let image = self.image(case);
        self.soft.run(case, &image).map(|outcome| (outcome.vector, outcome.rip))
    }

    /// The smallest case with some of `case`'s instructions that still differs.
    pub fn minimize(&mut self, case: &Case) -> Case {
        // Without the start or end of its counter a loop is endless.
        self.native.timeout = Duration::from_millis(200);
        let best = self.smallest(case);
        self.native.timeout = TIMEOUT;
        best
    }

    fn smallest(&mut self, case: &Case) -> Case {
        let mut best = case.clone();
        loop {
            let smaller = (0..best.items.len()).find_map(|i| {
                let items = without(&best.items, i);
                if items.is_empty() || reads_undefined(&items).is_some() {
                    return None;
                }
                let candidate = best.with_items(items).ok()?;
                matches!(self.check(&candidate), Verdict::Different(_)).then_some(candidate)
            });
            match smaller {
                Some(smaller) => best = smaller,
                None => return best,
            }
        }
    }
}

/// The items without number `i`; jumps lead to the same instructions as before.
fn without(items: &[Item], i: usize) -> Vec<Item> {
    let mut rest = items.to_vec();
    rest.remove(i);
    for item in &mut rest {
        if let Some(Target::Item(t)) = &mut item.target
            && *t > i
        {
            *t -= 1;
        }
    }
    rest
}

/// A description of a case for people: state, bytes and disassembly.
pub fn describe(case: &Case) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mut formatter = GasFormatter::new();
    let mut decoder = iced_x86::Decoder::with_ip(
        case.mode.bitness(),
        &case.code.bytes,
        case.start(),
        crate::forms::Catalogue::default().decoder_options(),
    );
    // Writing to a String does not fail.
    for insn in &mut decoder {
        let at = (insn.ip() - case.start()) as usize;
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        let bytes: Vec<String> =
            case.code.bytes[at..at + insn.len()].iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(text, "  {:#x}  {:<32} {line}   {:?}", insn.ip(), bytes.join(" "), insn.code());
    }
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    for i in 0..case.mode.registers() {
        let name = names.get(i).map_or_else(|| format!("r{i}"), |n| (*n).to_owned());
        let _ = write!(text, "  {name:<3} {:016x}{}", case.gpr[i], if i % 4 == 3 { "\n" } else { "" });
    }
    let fpu = &case.fpu.0;
    let word = |at: usize| u16::from_le_bytes([fpu[at], fpu[at + 1]]);
    let _ = writeln!(
        text,
        "  rflags {:#x}  fcw {:#x}  fsw {:#x}  ftw {:#x}  mxcsr {:#x}  {}",
        case.rflags,
        word(0),
        word(2),
        fpu[4],
        word(24),
        if case.mode == CodeMode::Bits32 { "32-bit code" } else { "64-bit code" },
    );
    for (addr, data) in &case.patches {
        let _ = writeln!(text, "  [{addr:#x}] = {data:02x?}");
    }
    text
}

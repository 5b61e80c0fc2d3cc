//! Machine code that is written by the program itself, as just-in-time compilers do.

use crate::system::Mapping;
use crate::{Outcome, Stop, Task, expect};

const CODE_PAGES: usize = 64;
/// Operations of a function of [`generate`].
const OPERATIONS: usize = 40;
/// No operation is longer.
const LONGEST: usize = 5;
/// How often a function is called before the next one, or its next form.
const CALLS: u32 = 10;
/// Where the constant of `mov eax, imm32` begins.
const CONSTANT: usize = 1;

/// An operation on `eax`; `edi` is the function's argument.
#[derive(Clone, Copy)]
enum Operation {
    Add(u32),
    Xor(u32),
    Subtract(u32),
    Rotate(u8),
    AddArgument,
    MultiplyByArgument,
}

impl Operation {
    fn random(random: &mut fastrand::Rng) -> Self {
        match random.u32(..6) {
            0 => Self::Add(random.u32(..)),
            1 => Self::Xor(random.u32(..)),
            2 => Self::Subtract(random.u32(..)),
            3 => Self::Rotate(random.u8(1..32)),
            4 => Self::AddArgument,
            _ => Self::MultiplyByArgument,
        }
    }

    /// Appends its machine code (SDM volume 2).
    fn assemble(self, code: &mut Vec<u8>) {
        let mut with_constant = |opcode: u8, constant: u32| {
            code.push(opcode);
            code.extend_from_slice(&constant.to_le_bytes());
        };
        match self {
            Self::Add(constant) => with_constant(0x05, constant),
            Self::Xor(constant) => with_constant(0x35, constant),
            Self::Subtract(constant) => with_constant(0x2d, constant),
            Self::Rotate(by) => code.extend_from_slice(&[0xc1, 0xc0, by]),
            Self::AddArgument => code.extend_from_slice(&[0x01, 0xf8]),
            Self::MultiplyByArgument => code.extend_from_slice(&[0x0f, 0xaf, 0xc7]),
        }
    }

    fn apply(self, value: u32, argument: u32) -> u32 {
        match self {
            Self::Add(constant) => value.wrapping_add(constant),
            Self::Xor(constant) => value ^ constant,
            Self::Subtract(constant) => value.wrapping_sub(constant),
            Self::Rotate(by) => value.rotate_left(by.into()),
            Self::AddArgument => value.wrapping_add(argument),
            Self::MultiplyByArgument => value.wrapping_mul(argument),
        }
    }
}

/// Memory for code that may be written at any time.
struct Code(Mapping);

impl Code {
    fn new() -> std::io::Result<Self> {
        Mapping::new(CODE_PAGES, libc::PROT_EXEC).map(Self)
    }

    /// Writes `bytes` at `offset`.
    fn write(&self, offset: usize, bytes: &[u8]) -> Outcome {
        if offset > self.0.len() || bytes.len() > self.0.len() - offset {
            return Err(Stop::Failed(format!("there is no room for code at {offset}")));
        }
        // SAFETY: inside the mapping, of which there are no references; no thread executes it now.
        unsafe { self.0.start().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Calls the function at `offset`.
    ///
    /// # Safety
    /// It must have been written there by this module, up to its `ret`.
    unsafe fn call(&self, offset: usize, argument: u32) -> u32 {
        // SAFETY: the caller says that there is a function, and this module's take and give one number.
        let function =
            unsafe { std::mem::transmute::<*mut u8, extern "C" fn(u32) -> u32>(self.0.start().add(offset)) };
        function(argument)
    }
}

pub fn generate(task: &Task) -> Outcome {
    let code = Code::new()?;
    let mut random = fastrand::Rng::with_seed(7);
    let mut offset = 0;
    let mut bytes = Vec::with_capacity((OPERATIONS + 2) * LONGEST);
    for _ in 0..u64::from(task.count) * 1000 {
        let operations: [Operation; OPERATIONS] = std::array::from_fn(|_| Operation::random(&mut random));
        bytes.clear();
        // mov eax, edi; the operations; ret
        bytes.extend_from_slice(&[0x89, 0xf8]);
        operations.iter().for_each(|operation| operation.assemble(&mut bytes));
        bytes.push(0xc3);
        if offset + bytes.len() > code.0.len() {
            offset = 0;
        }
        code.write(offset, &bytes)?;
        for argument in 1..=CALLS {
            // SAFETY: written above, and it ends with `ret`.
            let result = unsafe { code.call(offset, argument) };
            // The first and the last one tell enough; all would take longer than the code does.
            if argument == 1 || argument == CALLS {
                let right = operations.iter().fold(argument, |value, o| o.apply(value, argument));
                expect("what a generated function gives", result, right)?;
            }
        }
        offset += bytes.len();
    }
    Ok(())
}

pub fn rewrite(task: &Task) -> Outcome {
    let code = Code::new()?;
    // mov eax, 0; add eax, edi; ret
    code.write(0, &[0xb8, 0, 0, 0, 0, 0x01, 0xf8, 0xc3])?;
    for constant in 0..task.count.saturating_mul(1000) {
        code.write(CONSTANT, &constant.to_le_bytes())?;
        for argument in 0..CALLS {
            // SAFETY: written above; the change left all but the constant as it was.
            let result = unsafe { code.call(0, argument) };
            expect("what the changed function gives", result, constant.wrapping_add(argument))?;
        }
    }
    Ok(())
}

//! Calls, returns and jumps whose targets change.

use std::hint::black_box;

use crate::{Outcome, Stop, Task, expect};

/// Where the Collatz sequences of one unit of work begin: 1 up to this, exclusive.
const LIMIT: i64 = 1000;
const VARIABLES: usize = 3;
const NUMBER: usize = 0;
const START: usize = 1;
const STEPS: usize = 2;
const SHAPES: u32 = 1000;

/// Instructions of a stack machine. Jumps go to the instruction with that index.
#[derive(Clone, Copy)]
enum Op {
    Push(i64),
    Load(usize),
    Store(usize),
    Add,
    Multiply,
    ShiftRight,
    And,
    Less,
    Jump(usize),
    JumpIfZero(usize),
    Halt,
}

/// Counts the steps of all sequences in `STEPS`; `START` is 1 before.
const PROGRAM: [Op; 36] = [
    // 0: while START < LIMIT: NUMBER = START
    Op::Load(START),
    Op::Push(LIMIT),
    Op::Less,
    Op::JumpIfZero(35),
    Op::Load(START),
    Op::Store(NUMBER),
    // 6: while 1 < NUMBER
    Op::Push(1),
    Op::Load(NUMBER),
    Op::Less,
    Op::JumpIfZero(30),
    // 10: STEPS = STEPS + 1
    Op::Load(STEPS),
    Op::Push(1),
    Op::Add,
    Op::Store(STEPS),
    // 14: if NUMBER & 1 != 0
    Op::Load(NUMBER),
    Op::Push(1),
    Op::And,
    Op::JumpIfZero(25),
    // 18: NUMBER = NUMBER * 3 + 1
    Op::Load(NUMBER),
    Op::Push(3),
    Op::Multiply,
    Op::Push(1),
    Op::Add,
    Op::Store(NUMBER),
    Op::Jump(6),
    // 25: else: NUMBER = NUMBER >> 1
    Op::Load(NUMBER),
    Op::Push(1),
    Op::ShiftRight,
    Op::Store(NUMBER),
    Op::Jump(6),
    // 30: START = START + 1
    Op::Load(START),
    Op::Push(1),
    Op::Add,
    Op::Store(START),
    Op::Jump(0),
    // 35:
    Op::Halt,
];

pub fn interpreter(task: &Task) -> Outcome {
    let steps_from = |start: i64| {
        let next = |n: &i64| (*n > 1).then_some(if n & 1 == 1 { n * 3 + 1 } else { n >> 1 });
        std::iter::successors(Some(start), next).count() as i64 - 1
    };
    let right: i64 = (1..LIMIT).map(steps_from).sum();
    for _ in 0..task.count {
        let mut variables = [0, 1, 0];
        interpret(black_box(&PROGRAM), &mut variables)
            .ok_or_else(|| Stop::Failed("the program left its code or its stack".to_owned()))?;
        expect("the number of steps", variables[STEPS], right)?;
    }
    Ok(())
}

/// Runs `code` until it halts; none if it leaves its code, its stack or its variables.
fn interpret(code: &[Op], variables: &mut [i64; VARIABLES]) -> Option<()> {
    let mut stack = Vec::with_capacity(8);
    let mut at = 0;
    loop {
        let op = *code.get(at)?;
        at += 1;
        match op {
            Op::Push(value) => stack.push(value),
            Op::Load(index) => stack.push(*variables.get(index)?),
            Op::Store(index) => *variables.get_mut(index)? = stack.pop()?,
            Op::Add => apply(&mut stack, i64::wrapping_add)?,
            Op::Multiply => apply(&mut stack, i64::wrapping_mul)?,
            Op::ShiftRight => apply(&mut stack, |a, b| a.wrapping_shr(b as u32))?,
            Op::And => apply(&mut stack, |a, b| a & b)?,
            Op::Less => apply(&mut stack, |a, b| i64::from(a < b))?,
            Op::Jump(target) => at = target,
            Op::JumpIfZero(target) => {
                if stack.pop()? == 0 {
                    at = target;
                }
            }
            Op::Halt => return Some(()),
        }
    }
}

#[inline(always)]
fn apply(stack: &mut Vec<i64>, operation: impl Fn(i64, i64) -> i64) -> Option<()> {
    let right = stack.pop()?;
    let left = stack.last_mut()?;
    *left = operation(*left, right);
    Some(())
}

pub fn recursion(task: &Task) -> Outcome {
    (0..task.count).try_for_each(|_| expect("Fibonacci number 25", fibonacci(black_box(25)), 75_025))
}

#[inline(never)]
fn fibonacci(n: u32) -> u32 {
    // Both calls are hidden, else the compiler makes a loop of one of them.
    if n < 2 { n } else { black_box(fibonacci(n - 1)) + black_box(fibonacci(n - 2)) }
}

/// What virtual calls are made on.
trait Shape {
    fn area(&self) -> u64;
}

struct Square(u64);
struct Rectangle(u64, u64);
struct Frame(u64, u64);
struct Nothing;

impl Shape for Square {
    fn area(&self) -> u64 {
        self.0 * self.0
    }
}

impl Shape for Rectangle {
    fn area(&self) -> u64 {
        self.0 * self.1
    }
}

impl Shape for Frame {
    fn area(&self) -> u64 {
        self.0 * self.0 - self.1 * self.1
    }
}

impl Shape for Nothing {
    fn area(&self) -> u64 {
        0
    }
}

pub fn virtual_calls(task: &Task) -> Outcome {
    let mut random = fastrand::Rng::with_seed(5);
    let mut right = 0;
    let shapes: Vec<Box<dyn Shape>> = (0..SHAPES)
        .map(|i| {
            let (i, kind) = (u64::from(i), random.u32(..4));
            right += [i * i, i * 2, 2 * i + 1, 0][kind as usize];
            let shape: Box<dyn Shape> = match kind {
                0 => Box::new(Square(i)),
                1 => Box::new(Rectangle(i, 2)),
                2 => Box::new(Frame(i + 1, i)),
                _ => Box::new(Nothing),
            };
            shape
        })
        .collect();
    for _ in 0..task.count {
        for _ in 0..1000 {
            let area: u64 = black_box(&shapes).iter().map(|shape| shape.area()).sum();
            expect("the area of all shapes", area, right)?;
        }
    }
    Ok(())
}

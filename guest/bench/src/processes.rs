//! Processes: their creation, and switches between them.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::{Outcome, Stop, Task, expect, start_child, wait_for};

/// Processes in the ring of [`switches`].
const RING: u32 = 16;

/// Runs a program and returns what it printed.
pub fn program(path: &str, arguments: &[&str]) -> Result<String, Stop> {
    let output = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|e| Stop::Failed(format!("{path}: {e}")))?;
    if !output.status.success() {
        return Err(Stop::Failed(format!("{path} {}: {}", arguments.join(" "), output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn dd(task: &Task) -> Outcome {
    let count = format!("count={}", u64::from(task.count) * 1000);
    program(task.busybox, &["dd", "if=/dev/zero", "of=/dev/null", "bs=1", &count]).map(|_| ())
}

pub fn fork_exec(task: &Task) -> Outcome {
    let (busybox, times) = (task.busybox, u64::from(task.count) * 100);
    let script = format!("i=0; while [ $i -lt {times} ]; do {busybox} true || exit 1; i=$((i+1)); done");
    program(busybox, &["sh", "-c", &script]).map(|_| ())
}

pub fn ping_pong(task: &Task) -> Outcome {
    ring(2, task.count.saturating_mul(1000))
}

pub fn switches(task: &Task) -> Outcome {
    ring(RING, (task.count.saturating_mul(1000)) / RING)
}

/// Sends one byte `rounds` times round a ring of `processes`, of which this is one.
fn ring(processes: u32, rounds: u32) -> Outcome {
    // The first pipe leads from this process to the first child, the next from there to the second child, the last
    // one back. Each process closes the ends of others: if one fails, all get an error instead of waiting.
    let (mut readers, mut writers) = (VecDeque::new(), VecDeque::new());
    for _ in 0..processes {
        let (reader, writer) = std::io::pipe()?;
        readers.push_back(reader);
        writers.push_back(writer);
    }
    let missing = || std::io::Error::other("a pipe is missing");
    let mut out = writers.pop_front().ok_or_else(missing)?;
    let mut children = Vec::new();
    for _ in 1..processes {
        children.push(start_child(|| {
            let ends = (readers.pop_front(), writers.pop_front());
            readers.clear();
            writers.clear();
            let (Some(mut from), Some(mut to)) = ends else { return 1 };
            let mut byte = [0];
            let mut pass_on = || from.read_exact(&mut byte).and_then(|()| to.write_all(&byte));
            i32::from((0..rounds).try_for_each(|_| pass_on()).is_err())
        })?);
        readers.pop_front();
        writers.pop_front();
    }
    let mut back = readers.pop_front().ok_or_else(missing)?;
    for round in 0..rounds {
        let sent = [round as u8];
        let mut received = [0];
        out.write_all(&sent)?;
        back.read_exact(&mut received)?;
        expect("the byte that came back", received, sent)?;
    }
    children.into_iter().try_for_each(|child| expect("a child's status", wait_for(child)?, 0))
}

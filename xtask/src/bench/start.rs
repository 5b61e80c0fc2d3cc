//! How long a VM takes to its first instruction: a multiboot kernel that writes a character to the serial port at once,
//! and then to the debug-exit port, under Berth's engines and under QEMU's microvm, in turn.
//!
//! Times begin before the process is started. The first instruction is done a little before the character comes out at
//! the process's standard output, which is the first time; the second is when the process was waited for. The memory is
//! that of a process whose guest halts instead.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use super::process::{self, Interrupt, Process};
use super::statistics::Spread;

/// The guest's memory.
const MEMORY: &str = "128M";
/// The debug-exit port of Berth and of QEMU's device as it is given here.
const PORT: u8 = 0xf4;
/// What the guest writes there, and the exit code that this gives.
const VALUE: u8 = 0x10;
const EXIT_CODE: i32 = (VALUE as i32) << 1 | 1;
/// Where the kernel is loaded.
const LOAD_AT: u32 = 2 << 20;
/// After so long a VM whose guest halts does nothing any more.
const SETTLING: Duration = Duration::from_millis(500);

/// Arguments of `bench start`.
#[derive(Args)]
pub struct StartArguments {
    /// How often each is started
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// A Berth that is built already, instead of this workspace's
    #[arg(long, value_name = "FILE")]
    berth: Option<PathBuf>,
    /// QEMU's system emulator; left out if it is not there
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
}

/// One way to start the guest.
struct Side {
    name: &'static str,
    /// The command without its kernel, and the option that takes that.
    command: Vec<String>,
    firsts: Vec<f64>,
    walls: Vec<f64>,
}

/// `bench start`: prints what it measured.
///
/// # Errors
/// A text when something could not be built, or a VM does not end as it should.
pub fn run(arguments: &StartArguments) -> Result<(), String> {
    let berth = match &arguments.berth {
        Some(path) => path.clone(),
        None => super::guest::build_berth()?.0,
    };
    let directory = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
    // MOV DX, 0x3f8; MOV AL, '.'; OUT DX, AL; MOV AL, VALUE; OUT PORT, AL; HLT; and again.
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xb0, VALUE, 0xe6, PORT, 0xf4, 0xeb, 0xfd];
    let exit = kernel(directory.path(), "exit", &code)?;
    let halt = kernel(directory.path(), "halt", &[0xf4, 0xeb, 0xfd])?;

    let mut sides = sides(&berth, arguments)?;
    for _ in 0..arguments.rounds {
        for side in &mut sides {
            let (first, wall) = start(&side.command, &exit).map_err(|e| format!("{}: {e}", side.name))?;
            side.firsts.push(first * 1000.0);
            side.walls.push(wall * 1000.0);
        }
    }
    println!("- rounds: {}, in turn; load after: {}", arguments.rounds, super::load());
    println!(
        "\n| VM of 1 vCPU and {MEMORY} | first instruction | end of the process | resident while the guest halts |"
    );
    println!("|---|---|---|---|");
    for side in &sides {
        let resident = resident(&side.command, &halt).map_err(|e| format!("{}: {e}", side.name))?;
        let spread = |times: &[f64]| {
            let s = Spread::of(times).ok_or("no round was made")?;
            Ok::<_, String>(format!("{:.1} ms ({:.1}–{:.1})", s.median, s.least, s.most))
        };
        let (first, wall) = (spread(&side.firsts)?, spread(&side.walls)?);
        println!("| {} | {first} | {wall} | {:.1} MiB |", side.name, resident / f64::from(1 << 20));
    }
    println!("\nMedian (least to most).");
    Ok(())
}

fn sides(berth: &Path, arguments: &StartArguments) -> Result<Vec<Side>, String> {
    let side = |name, program: &Path, options: &str| {
        let program = program.to_str().ok_or_else(|| format!("{} is no text", program.display()))?;
        let command = [program].into_iter().chain(options.split(' ')).map(str::to_owned).collect();
        Ok::<_, String>(Side { name, command, firsts: Vec::new(), walls: Vec::new() })
    };
    let of_berth = |engine| format!("run --engine {engine} --memory {MEMORY} --debug-exit --kernel");
    let of_qemu = |accel| {
        format!(
            "-M microvm -accel {accel} -m {MEMORY} -nodefaults -no-user-config -display none -no-reboot \
             -serial stdio -device isa-debug-exit,iobase={PORT:#x},iosize=4 -kernel"
        )
    };
    let mut sides = Vec::new();
    let kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &kvm {
        eprintln!("/dev/kvm: {e}: it is left out");
    }
    let qemu = process::version(&arguments.qemu).is_some();
    if !qemu {
        eprintln!("{} is not installed: there will be no comparison with it", arguments.qemu.display());
    }
    if kvm.is_ok() {
        sides.push(side("Berth, kvm engine", berth, &of_berth("kvm"))?);
        if qemu {
            sides.push(side("QEMU microvm, kvm", &arguments.qemu, &of_qemu("kvm"))?);
        }
    }
    sides.push(side("Berth, soft engine", berth, &of_berth("soft"))?);
    if qemu {
        sides.push(side("QEMU microvm, tcg", &arguments.qemu, &of_qemu("tcg"))?);
    }
    Ok(sides)
}

/// A multiboot 1 kernel (specification 0.6.96, 3.1) in a minimal ELF-less image, which both programs load: header
/// with addresses, then `code` for 32-bit protected mode.
fn kernel(directory: &Path, name: &str, code: &[u8]) -> Result<PathBuf, String> {
    const MAGIC: u32 = 0x1bad_b002;
    /// The header has addresses.
    const FLAGS: u32 = 1 << 16;
    let header: [u32; 8] =
        [MAGIC, FLAGS, 0_u32.wrapping_sub(MAGIC + FLAGS), LOAD_AT, LOAD_AT, 0, 0, LOAD_AT + 32];
    let path = directory.join(name);
    let image = [header.map(u32::to_le_bytes).concat(), code.to_vec()].concat();
    fs::write(&path, image).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

fn command(words: &[String], kernel: &Path) -> Result<Command, String> {
    let (program, options) = words.split_first().ok_or("no program")?;
    let mut command = Command::new(program);
    command.args(options).arg(kernel);
    Ok(command)
}

/// Seconds until the guest's character comes out, and until the process has ended.
fn start(words: &[String], kernel: &Path) -> Result<(f64, f64), String> {
    let mut command = command(words, kernel)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let begun = Instant::now();
    let mut child = command.spawn().map_err(|e| format!("it could not be started: {e}"))?;
    let mut character = [0];
    let read = child.stdout.take().ok_or("it has no standard output")?.read_exact(&mut character);
    let first = begun.elapsed().as_secs_f64();
    let status = child.wait().map_err(|e| format!("it could not be waited for: {e}"))?;
    let wall = begun.elapsed().as_secs_f64();
    match status.code() {
        Some(EXIT_CODE) => {
            read.map(|()| (first, wall)).map_err(|e| format!("its guest printed nothing: {e}"))
        }
        _ => Err(format!("it ended with {status} instead of exit code {EXIT_CODE}")),
    }
}

/// Resident memory in bytes of a VM whose guest halts, what it touched of its own memory included.
fn resident(words: &[String], kernel: &Path) -> Result<f64, String> {
    let process = Process::start(&mut command(words, kernel)?, &Interrupt::default())?;
    thread::sleep(SETTLING);
    process.resident()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_has_a_valid_header() {
        let directory = tempfile::tempdir().unwrap();
        let image = fs::read(kernel(directory.path(), "k", &[0xf4]).unwrap()).unwrap();
        let word = |n: usize| u32::from_le_bytes(image[4 * n..][..4].try_into().unwrap());
        assert_eq!(word(0).wrapping_add(word(1)).wrapping_add(word(2)), 0);
        assert_eq!((word(7), image.len()), (LOAD_AT + 32, 33));
    }

    #[test]
    fn another_end_is_an_error() {
        let words = |script: &str| ["sh", "-c", script].map(str::to_owned).to_vec();
        let (first, wall) = start(&words("echo .; exit 33"), Path::new("/")).unwrap();
        assert!(0.0 <= first && first <= wall);
        assert!(start(&words("exit 33"), Path::new("/")).unwrap_err().contains("nothing"));
        assert!(start(&words("exit 1"), Path::new("/")).unwrap_err().contains("33"));
    }
}

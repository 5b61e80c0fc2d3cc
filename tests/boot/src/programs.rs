//! The test programs: compiled for the guest, without shared libraries.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::initrd::File;

/// For 64-bit programs: the instruction set that the guest is promised, and AES and PCLMUL.
const FLAGS_64: [&str; 6] = ["-static", "-march=x86-64-v3", "-maes", "-mpclmul", "-mcx16", "-pthread"];
/// For the 32-bit program, which brings its own `_start`.
const FLAGS_32: [&str; 8] = [
    "-m32",
    "-msse",
    "-static",
    "-nostdlib",
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
];

/// Names of the programs in `programs/`, without `.c`.
pub const PROGRAMS: [&str; 10] =
    ["vector", "x87", "strings", "signals", "threads", "mappings", "code", "processes", "timers", "ia32"];

/// Names of programs that other tests run, with arguments or without an end.
const DEVICE_PROGRAMS: [&str; 4] = ["writer", "vsock", "pages", "pagemap"];

/// Scripts for the guest's shell.
const SCRIPTS: [(&str, &str); 6] = [
    ("fio-rounds.sh", include_str!("../programs/fio-rounds.sh")),
    ("bridged.sh", include_str!("../programs/bridged.sh")),
    ("exchange.sh", include_str!("../programs/exchange.sh")),
    ("measure-disk.sh", include_str!("../programs/measure-disk.sh")),
    ("obey.sh", include_str!("../programs/obey.sh")),
    ("measure-net.sh", include_str!("../programs/measure-net.sh")),
];

/// Why there is no program.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// A file.
    #[error("cannot {doing} {path}: {source}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The compiler is not content.
    #[error("gcc cannot compile programs/{name}.c:\n{said}")]
    Compile {
        /// The program.
        name: &'static str,
        /// What the compiler said.
        said: String,
    },
}

/// Compiles all programs; returns them and the scripts, in `/tests`. What was compiled from the same text is kept in
/// `directory`.
///
/// # Errors
/// Any [`ProgramError`].
pub fn compile_all(directory: &Path) -> Result<Vec<File>, ProgramError> {
    fs::create_dir_all(directory).map_err(file("create", directory))?;
    let programs = PROGRAMS.into_iter().chain(DEVICE_PROGRAMS);
    let compiled = programs.map(|name| Ok(in_tests(name, compile(name, directory)?)));
    compiled.chain(scripts().into_iter().map(Ok)).collect()
}

/// The scripts, in `/tests`.
pub fn scripts() -> Vec<File> {
    SCRIPTS.iter().map(|(name, text)| in_tests(name, text.as_bytes().to_vec())).collect()
}

fn in_tests(name: &str, content: Vec<u8>) -> File {
    File { path: format!("/tests/{name}"), content }
}

fn compile(name: &'static str, directory: &Path) -> Result<Vec<u8>, ProgramError> {
    let flags: &[&str] = if name == "ia32" { &FLAGS_32 } else { &FLAGS_64 };
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let source = sources.join(name).with_extension("c");
    let mut hasher = DefaultHasher::new();
    flags.hash(&mut hasher);
    for path in [&source, &sources.join("check.h")] {
        fs::read(path).map_err(file("read", path))?.hash(&mut hasher);
    }
    let program = directory.join(format!("{name}-{:016x}", hasher.finish()));
    if !program.exists() {
        // Tests run at the same time: each makes its own file and puts it into place as a whole.
        let temporary = directory.join(format!("{name}.{}", std::process::id()));
        let output = Command::new("gcc")
            .args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&temporary)
            .args(flags)
            .arg(&source)
            .args(if name == "ia32" { &[][..] } else { &["-lm"][..] })
            .output()
            .map_err(file("compile", &source))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(ProgramError::Compile { name, said });
        }
        fs::rename(&temporary, &program).map_err(file("create", &program))?;
    }
    fs::read(&program).map_err(file("read", &program))
}

/// For `map_err`.
fn file(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ProgramError {
    let path = path.to_owned();
    move |source| ProgramError::File { doing, path, source }
}

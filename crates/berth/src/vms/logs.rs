//! `berth logs`: what a VM's console has printed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use berth_api::{VmDirectory, Vms};
use clap::Args;

use super::{OneName, VmsError};

/// How often it is looked whether there is more.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Arguments of `berth logs`.
#[derive(Debug, Args)]
#[command(
    after_help = "At least the last 1 MiB is kept, as long as the VM runs; of a VM that was started with \
`berth run --detach` and ended by itself, until `berth rm`."
)]
pub struct LogsArguments {
    #[command(flatten)]
    name: OneName,
    /// Go on with what is printed from now on, until the VM ends
    #[arg(short, long)]
    follow: bool,
    /// What Berth itself has said since the VM was in the background, instead of its console
    #[arg(long)]
    berth: bool,
}

/// Prints what is there, and follows it.
pub fn logs(arguments: &LogsArguments) -> Result<ExitCode, VmsError> {
    let directory = Vms::open()?.get(arguments.name.name.as_str())?;
    let printed = print(&directory, arguments);
    match printed {
        // The reader has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        result => result.map(|()| ExitCode::SUCCESS).map_err(VmsError::host("print the log")),
    }
}

fn print(directory: &VmDirectory, arguments: &LogsArguments) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let path = if arguments.berth { directory.log() } else { directory.console_log() };
    let mut file = match open(&path)? {
        Some(file) => file,
        None => return Ok(()),
    };
    if !arguments.berth
        && let Some(mut older) = open(&directory.older_console_log())?
    {
        copy(&mut older, &mut out)?;
    }
    copy(&mut file, &mut out)?;
    if !arguments.follow {
        return Ok(());
    }
    loop {
        // Looked at first: what is printed until then is read below.
        let alive = directory.is_alive();
        copy(&mut file, &mut out)?;
        if let Some(newer) = open(&path)?.filter(|newer| !same(newer, &file)) {
            copy(&mut file, &mut out)?;
            file = newer;
            continue;
        }
        if !alive {
            return Ok(());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn same(a: &File, b: &File) -> bool {
    let id = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
    id(a) == id(b)
}

fn copy(file: &mut File, out: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return out.flush(),
            n => out.write_all(buffer.get(..n).unwrap_or_default())?,
        }
    }
}

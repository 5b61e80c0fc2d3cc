//! `berth disk`: images at rest.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use berth_disk::{CreateOptions, DiskError, Format};
use berth_machine::options::size;
use clap::error::ErrorKind;
use clap::{CommandFactory, Subcommand};

use crate::cli::Cli;

/// Size of a disk in bytes. What file systems of hosts can hold is less.
const SIZES: std::ops::RangeInclusive<u64> = 512..=1 << 60;

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an empty image
    Create {
        /// The new file
        file: PathBuf,
        /// Size such as 20G; not needed with --backing
        #[arg(value_parser = parse_size, required_unless_present = "backing")]
        size: Option<u64>,
        /// raw or qcow2 [default: by the name: qcow2 for NAME.qcow2, else raw]
        #[arg(long)]
        format: Option<Format>,
        /// Image whose content shows where the new one has none (qcow2 only)
        #[arg(long, value_name = "FILE")]
        backing: Option<PathBuf>,
        /// Format of the backing file [default: by its name]
        #[arg(long, value_name = "FORMAT", requires = "backing")]
        backing_format: Option<Format>,
    },
    /// Say what an image is
    Info {
        /// The image
        file: PathBuf,
        /// Its format [default: by the name]
        #[arg(long)]
        format: Option<Format>,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Give an image another size
    Resize {
        /// The image
        file: PathBuf,
        /// Its new size, such as 20G
        #[arg(value_parser = parse_size)]
        size: u64,
        /// Its format [default: by the name]
        #[arg(long)]
        format: Option<Format>,
        /// Allow a smaller size: what is behind it is lost
        #[arg(long)]
        shrink: bool,
    },
    /// Copy an image, perhaps into another format
    Convert {
        /// The image
        from: PathBuf,
        /// The new image
        to: PathBuf,
        /// Format of the image [default: by the name]
        #[arg(long, value_name = "FORMAT")]
        from_format: Option<Format>,
        /// Format of the new image [default: by the name]
        #[arg(long, value_name = "FORMAT")]
        to_format: Option<Format>,
    },
    /// Keep an image as it is now, and go on in a new one on top of it
    Snapshot {
        /// The image, which must not change any more as long as the new one is used
        file: PathBuf,
        /// The new image (qcow2), to be used instead from now on
        new: PathBuf,
        /// Format of the image [default: by the name]
        #[arg(long)]
        format: Option<Format>,
    },
}

fn parse_size(text: &str) -> Result<u64, size::SizeError> {
    size::parse(text, SIZES)
}

/// Does it.
///
/// # Errors
/// [`DiskError`].
pub fn run(command: &DiskCommand) -> Result<ExitCode, DiskError> {
    match command {
        DiskCommand::Create { file, size, format, backing, backing_format } => {
            let format = format.unwrap_or_else(|| Format::of_name(file));
            if backing.is_some() && format == Format::Raw {
                let text = format!(
                    "--backing needs --format qcow2: {} is to be a raw image, which has no backing file",
                    file.display()
                );
                Cli::command().error(ErrorKind::ArgumentConflict, text).exit();
            }
            let backing = backing.as_ref().map(|b| (b.clone(), backing_format.unwrap_or(Format::of_name(b))));
            berth_disk::create(&CreateOptions { path: file.clone(), format, size: *size, backing })?;
        }
        DiskCommand::Info { file, format, json } => {
            let info = berth_disk::info(file, *format)?;
            let text = if *json {
                // Serializing plain data cannot fail.
                serde_json::to_string_pretty(&info).unwrap_or_default() + "\n"
            } else {
                describe(&info)
            };
            return Ok(crate::print(&text));
        }
        DiskCommand::Resize { file, size, format, shrink } => {
            berth_disk::resize(file, *format, *size, *shrink)?;
        }
        DiskCommand::Convert { from, to, from_format, to_format } => {
            let to_format = to_format.unwrap_or_else(|| Format::of_name(to));
            let mut progress = Progress::default();
            let result = berth_disk::convert(from, *from_format, to, to_format, |done, all| {
                progress.show(done, all);
            });
            progress.end();
            result?;
        }
        DiskCommand::Snapshot { file, new, format } => {
            let backing = Some((file.clone(), format.unwrap_or_else(|| Format::of_name(file))));
            let options = CreateOptions { path: new.clone(), format: Format::Qcow2, size: None, backing };
            berth_disk::create(&options)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(info: &berth_disk::Info) -> String {
    let mut text = format!(
        "format     {}\nsize       {} ({} bytes)\non host    {}\n",
        info.format,
        size::show(info.size),
        info.size,
        size::show(info.allocated)
    );
    if let Some(backing) = &info.backing {
        let format = info.backing_format.as_deref().unwrap_or("format not named");
        text.push_str(&format!("backing    {} ({format})\n", backing.display()));
    }
    text
}

/// A percentage on a terminal's standard error.
#[derive(Default)]
struct Progress {
    shown: Option<u64>,
}

impl Progress {
    fn show(&mut self, done: u64, all: u64) {
        let percent = done / (all / 100).max(1);
        if std::io::stderr().is_terminal() && self.shown != Some(percent) {
            self.shown = Some(percent);
            // A terminal that went away needs no progress.
            let _ = write!(std::io::stderr(), "\r{:3} % of {}", percent.min(100), size::show(all));
        }
    }

    fn end(&self) {
        if self.shown.is_some() {
            eprintln!();
        }
    }
}

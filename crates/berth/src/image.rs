//! `berth image`: root disks that VMs start from.

use std::fmt::Write;
use std::path::PathBuf;

use berth_image::{
    DEFAULT_SUITE, DebianOptions, Image, ImageError, Images, ImportOptions, MIN_SIZE, Name, data_directory,
};
use berth_machine::options::size;
use clap::{Args, Subcommand};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use serde_json::json;

/// Largest disk in bytes: what ext4 with blocks of 4 KiB and most file systems of hosts can hold.
const MAX_SIZE: u64 = 16 << 40;

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an image from a distribution's packages
    Build {
        /// What to build.
        #[command(subcommand)]
        what: BuildCommand,
    },
    /// List the images
    Ls {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Remove images
    Rm {
        /// Their names
        #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(image_names))]
        names: Vec<Name>,
    },
    /// Make an image of a disk file, raw or qcow2
    Import(ImportArguments),
}

/// Distributions that can be built.
#[derive(Debug, Subcommand)]
pub enum BuildCommand {
    /// Debian, with mmdebstrap: systemd, a network by DHCP, and root without a password on the consoles
    Debian(DebianArguments),
}

/// Arguments of `berth image build debian`.
#[derive(Debug, Args)]
pub struct DebianArguments {
    /// The suite
    #[arg(long, default_value = DEFAULT_SUITE, value_parser = parse_word)]
    suite: String,
    /// A package to install in addition; may be given several times
    #[arg(long = "package", value_name = "PACKAGE", value_parser = parse_word)]
    packages: Vec<String>,
    /// Size of the disk; what is not used occupies nothing on the host
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    size: u64,
    /// Where packages come from, instead of Debian's own servers with their updates
    #[arg(long, value_name = "URL", value_parser = parse_word)]
    mirror: Option<String>,
    /// Name of the image [default: debian, with another suite debian-SUITE]
    #[arg(long)]
    name: Option<Name>,
}

/// Arguments of `berth image import`.
#[derive(Debug, Args)]
pub struct ImportArguments {
    /// The disk
    file: PathBuf,
    /// Name of the image [default: that of the file]
    #[arg(long)]
    name: Option<Name>,
    /// The kernel to boot it with [default: the one in its ext4 file system]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for that kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// What the kernel is told [default: root= with the partition of the kernel, else the whole disk; and rw]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,
}

/// What is passed on to other programs must not look like one of their options, or like two.
fn parse_word(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_graphic() && c != ',';
    if text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(good) {
        Ok(text.to_owned())
    } else {
        Err("it must begin with a letter or digit and have no spaces and commas".to_owned())
    }
}

fn parse_size(text: &str) -> Result<u64, size::SizeError> {
    size::parse_pages(text, MIN_SIZE..=MAX_SIZE)
}

/// Names of images, for shells that complete them.
pub fn image_names() -> Vec<CompletionCandidate> {
    let Ok(data) = data_directory() else { return Vec::new() };
    Images::new(&data).names().into_iter().map(|name| CompletionCandidate::new(name.as_str())).collect()
}

/// Names of VMs that were kept, for shells that complete them.
pub fn vm_names() -> Vec<CompletionCandidate> {
    let Ok(data) = data_directory() else { return Vec::new() };
    Images::new(&data).vm_names().into_iter().map(|name| CompletionCandidate::new(name.as_str())).collect()
}

/// Does what `command` says; returns what is to be printed.
///
/// # Errors
/// [`ImageError`].
pub fn image(command: ImageCommand) -> Result<String, ImageError> {
    let images = Images::new(&data_directory()?);
    match command {
        ImageCommand::Build { what: BuildCommand::Debian(arguments) } => {
            let name = arguments.name.map_or_else(|| debian_name(&arguments.suite), Ok)?;
            let DebianArguments { suite, packages, size, mirror, .. } = arguments;
            images.build_debian(&name, &DebianOptions { suite, packages, size, mirror })?;
        }
        ImageCommand::Ls { json } => return list(&images, json),
        ImageCommand::Rm { names } => names.iter().try_for_each(|name| images.remove(name))?,
        ImageCommand::Import(arguments) => {
            let name = arguments.name.map_or_else(|| name_of(&arguments.file), Ok)?;
            let ImportArguments { file, kernel, initrd, append, .. } = arguments;
            images.import(&name, &ImportOptions { disk: file, kernel, initrd, cmdline: append })?;
        }
    }
    Ok(String::new())
}

fn debian_name(suite: &str) -> Result<Name, ImageError> {
    let name = if suite == DEFAULT_SUITE { "debian".to_owned() } else { format!("debian-{suite}") };
    name.parse().map_err(|_| ImageError::NoName { what: name })
}

/// The file's name without its extension.
fn name_of(file: &std::path::Path) -> Result<Name, ImageError> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    stem.parse().map_err(|_| ImageError::NoName { what: stem.into_owned() })
}

fn list(images: &Images, json: bool) -> Result<String, ImageError> {
    let all = images.names().iter().map(|name| images.describe(name)).collect::<Result<Vec<_>, _>>()?;
    Ok(if json { to_json(&all) } else { to_table(&all) })
}

fn to_json(images: &[Image]) -> String {
    let images: Vec<_> = images
        .iter()
        .map(|image| {
            json!({
                "name": image.name,
                "source": image.manifest.source,
                "created": image.manifest.created,
                "size": image.manifest.disk.size,
                "disk_usage": image.disk_usage(),
                "disk": image.disk(),
                "kernel": image.kernel(),
                "initrd": image.initrd(),
                "cmdline": image.manifest.cmdline,
            })
        })
        .collect();
    format!("{:#}\n", serde_json::Value::from(images))
}

fn to_table(images: &[Image]) -> String {
    if images.is_empty() {
        return "no images: make one with `berth image build debian`\n".to_owned();
    }
    let width = images.iter().map(|i| i.name.as_str().len()).max().unwrap_or(0).max("NAME".len());
    let mut text =
        format!("{:width$}  {:>10}  {:>10}  {:20}  SOURCE\n", "NAME", "SIZE", "ON DISK", "CREATED");
    for image in images {
        let (size, used) = (size::show(image.manifest.disk.size), size::show(image.disk_usage()));
        let (name, created, source) = (&image.name, &image.manifest.created, &image.manifest.source);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:width$}  {size:>10}  {used:>10}  {created:20}  {source}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_suites_and_files() {
        assert_eq!(debian_name("bookworm").unwrap().as_str(), "debian");
        assert_eq!(debian_name("trixie").unwrap().as_str(), "debian-trixie");
        assert_eq!(name_of("/a/disk-1.qcow2".as_ref()).unwrap().as_str(), "disk-1");
        assert!(name_of("/a/my disk.raw".as_ref()).unwrap_err().to_string().contains("--name"));
        assert!(name_of("/".as_ref()).is_err());
    }

    #[test]
    fn words_cannot_be_taken_for_options() {
        for good in
            ["bookworm", "g++", "linux-image-amd64/bookworm-backports", "http://deb.debian.org/debian"]
        {
            assert_eq!(parse_word(good).as_deref(), Ok(good));
        }
        for bad in ["", "-x", "--include=x", "a b", "a,b", "a\n"] {
            assert!(parse_word(bad).is_err(), "{bad:?}");
        }
    }
}

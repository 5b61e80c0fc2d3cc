//! What a VM boots: the user's kernel, an image's, or the default guest.

use std::path::PathBuf;

use berth_guest_image::KERNEL_PARAMETERS;
use berth_image::{Images, Name, VmDisk, data_directory};
use berth_machine::options::{ConsoleKind, NetOptions};

use crate::cli::Cli;
use crate::options::VmOptions;
use crate::run::RunError;
use crate::{log, terminal};

/// Command line for a kernel that the user names without one.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// What the guest boots.
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initrd, if there is one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The guest's first disk, if it comes from an image. Keep it as long as the VM runs.
    pub root_disk: Option<VmDisk>,
    /// Whether it is a guest with Berth's agent: the default guest, or an image.
    pub has_agent: bool,
}

/// Kernel, initrd and command line: the user's, or those of the image or of the default guest where the user names none.
///
/// # Errors
/// [`RunError`]: no such image, or no default guest.
pub fn choose(options: &VmOptions, name: &str, on_terminal: bool) -> Result<Boot, RunError> {
    if let Some(image) = &options.image {
        return from_image(options, image, name);
    }
    if let Some(kernel) = &options.kernel {
        return Ok(Boot {
            kernel: kernel.clone(),
            initrd: options.initrd.clone(),
            cmdline: options.append.clone().unwrap_or_else(|| DEFAULT_CMDLINE.to_owned()),
            root_disk: None,
            has_agent: false,
        });
    }
    if options.no_default_guest.unwrap_or(false) {
        use clap::CommandFactory;
        let text = "no kernel is named: pass --kernel FILE, or leave --no-default-guest out";
        Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, text).exit();
    }
    let guest = berth_guest_image::default_guest(&berth_guest_image::cache_directory()?)?;
    let term = std::env::var("TERM").ok();
    let window = on_terminal.then(terminal::size).flatten();
    Ok(Boot {
        kernel: guest.kernel,
        initrd: Some(options.initrd.clone().unwrap_or(guest.initrd)),
        cmdline: default_guest_cmdline(name, window, term.as_deref(), options.append.as_deref())
            + console_parameters(options.console.unwrap_or_default()),
        root_disk: None,
        has_agent: true,
    })
}

/// The image's kernel and root disk. A kernel that the user names is booted instead, with the user's initrd or none.
fn from_image(options: &VmOptions, image: &Name, name: &str) -> Result<Boot, RunError> {
    let images = Images::new(&data_directory()?);
    let image = images.get(image)?;
    let vm = options.name.as_ref().filter(|_| !options.ephemeral.unwrap_or(false));
    let root_disk = images.vm_disk(&image, vm)?;
    if vm.is_none() && options.ephemeral.is_none() {
        log::message(
            "what this VM writes to its root disk is thrown away at its end: with --name it is kept",
        );
    }
    let (kernel, initrd) = match &options.kernel {
        Some(kernel) => (kernel.clone(), options.initrd.clone()),
        None => (image.kernel(), options.initrd.clone().or(image.initrd())),
    };
    let console = options.console.unwrap_or_default();
    let cmdline = image_cmdline(&image.manifest.cmdline, name, console, options.append.as_deref());
    let has_agent = options.kernel.is_none();
    Ok(Boot { kernel, initrd, cmdline, root_disk: Some(root_disk), has_agent })
}

/// The network of a VM with an image whose user names none: through passt, where the host has that.
pub fn default_network(options: &VmOptions) -> Option<NetOptions> {
    if options.image.is_none() || !options.net.is_empty() || options.no_network.unwrap_or(false) {
        return None;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|directory| directory.join("passt").is_file()) {
        return Some(NetOptions { user: true, ..NetOptions::default() });
    }
    log::message(
        "this VM has no network: install passt, or name another with --net (--no-network if it shall have none)",
    );
    None
}

/// The command line for an image: what its disk needs, what the VM is, then what the user adds.
fn image_cmdline(of_image: &str, name: &str, console: ConsoleKind, append: Option<&str>) -> String {
    let mut cmdline =
        format!("{of_image} {DEFAULT_CMDLINE}{} systemd.hostname={name}", console_parameters(console));
    if let Some(append) = append {
        cmdline.push(' ');
        cmdline.push_str(append);
    }
    cmdline
}

/// What the default guest's kernel must know of a console that is not the serial port. The last one named is the one of
/// its programs.
fn console_parameters(console: ConsoleKind) -> &'static str {
    match console {
        ConsoleKind::Serial => "",
        ConsoleKind::Virtio => " console=hvc0",
    }
}

/// The default guest's command line: what its kernel and its init take, then what the user adds.
fn default_guest_cmdline(
    name: &str,
    window: Option<(u16, u16)>,
    term: Option<&str>,
    append: Option<&str>,
) -> String {
    let mut cmdline = format!("{KERNEL_PARAMETERS} berth.name={name}");
    if let Some((columns, rows)) = window {
        cmdline.push_str(&format!(" berth.winsize={columns}x{rows}"));
        // The kernel passes a parameter that it does not know to init as a variable.
        let plain =
            |t: &&str| !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || "-+_".contains(c));
        if let Some(term) = term.filter(plain) {
            cmdline.push_str(&format!(" TERM={term}"));
        }
    }
    if let Some(append) = append {
        cmdline.push(' ');
        cmdline.push_str(append);
    }
    cmdline
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_guests_command_line_ends_with_the_users() {
        let line = default_guest_cmdline("web", Some((80, 24)), Some("xterm-256color"), Some("loglevel=7"));
        assert_eq!(
            line,
            "console=ttyS0 quiet mitigations=off berth.name=web berth.winsize=80x24 TERM=xterm-256color loglevel=7"
        );
        assert_eq!(
            default_guest_cmdline("web", None, Some("xterm"), None),
            "console=ttyS0 quiet mitigations=off berth.name=web"
        );
    }

    #[test]
    fn an_images_command_line_ends_with_the_users() {
        assert_eq!(
            image_cmdline("root=/dev/vda rw", "web", ConsoleKind::Virtio, Some("quiet")),
            "root=/dev/vda rw console=ttyS0 console=hvc0 systemd.hostname=web quiet"
        );
        assert_eq!(
            image_cmdline("root=/dev/vda", "a", ConsoleKind::Serial, None),
            "root=/dev/vda console=ttyS0 systemd.hostname=a"
        );
    }

    #[test]
    fn a_strange_term_is_left_out() {
        for term in ["", "a b", "x\" init=/bin/sh", "a=b"] {
            assert!(!default_guest_cmdline("web", Some((1, 1)), Some(term), None).contains("TERM"), "{term}");
        }
    }
}

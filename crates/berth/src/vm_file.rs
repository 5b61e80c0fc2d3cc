//! VM files: the description of a VM in TOML (docs/vm-file.md). A key is an option of `berth run`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use berth_machine::options::{BalloonOptions, DiskOptions, NetOptions, VsockOptions};
use serde_aux::serde_introspection::serde_introspect;
use toml::de::DeTable;

use crate::options::VmOptions;

/// Most bytes of a VM file: far more than anybody writes, far less than a disk that is named by mistake.
const MAX_FILE: u64 = 1 << 20;
/// How alike two keys are, 0.0 to 1.0, if one may be meant by the other.
const ALIKE: f64 = 0.5;

/// Why a VM file is of no use. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum VmFileError {
    /// It cannot be read.
    #[error("VM file {}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// It is no description of a VM.
    #[error("VM file {}, line {line}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// What is wrong, and where in the text.
type Fault = (Range<usize>, String);

/// The options in the file at `path`. Relative paths in it are those of its own directory.
///
/// # Errors
/// [`VmFileError`].
pub fn read(path: &Path) -> Result<VmOptions, VmFileError> {
    let text = read_text(path).map_err(|source| VmFileError::Read { path: path.to_owned(), source })?;
    let mut options = parse(&text).map_err(|(span, reason)| {
        let before = text.get(..span.start).unwrap_or(&text);
        let line = 1 + before.matches('\n').count();
        VmFileError::Content { path: path.to_owned(), line, reason }
    })?;
    options.relative_to(path.parent().unwrap_or(Path::new("")));
    Ok(options)
}

fn read_text(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("it has more than {MAX_FILE} bytes")));
    }
    Ok(text)
}

fn parse(text: &str) -> Result<VmOptions, Fault> {
    let fault = |e: &toml::de::Error| (e.span().unwrap_or_default(), e.message().replace('\n', ", "));
    let table = DeTable::parse(text).map_err(|e| fault(&e))?;
    check_keys(table.get_ref(), serde_introspect::<VmOptions>())?;
    let options: VmOptions = toml::from_str(text).map_err(|e| {
        let (span, reason) = fault(&e);
        let value = text.get(span.clone()).filter(|v| !v.is_empty() && !v.contains('\n'));
        let reason = value.map_or(reason.clone(), |v| format!("{v} is not possible here: {reason}"));
        (span, reason)
    })?;
    // What goes wrong between keys has no one place; the device is named.
    options.devices().check().map_err(|e| (0..0, e.to_string()))?;
    Ok(options)
}

/// The keys of the tables that describe devices.
fn keys_of_device(name: &str) -> Option<&'static [&'static str]> {
    match name {
        "disk" => Some(serde_introspect::<DiskOptions>()),
        "net" => Some(serde_introspect::<NetOptions>()),
        "vsock" => Some(serde_introspect::<VsockOptions>()),
        "balloon" => Some(serde_introspect::<BalloonOptions>()),
        _ => None,
    }
}

/// Refuses keys that are not among `known`, and says which one may be meant.
fn check_keys(table: &DeTable<'_>, known: &[&str]) -> Result<(), Fault> {
    for (key, value) in table {
        let name = key.get_ref();
        if known.contains(&name.as_ref()) {
            if let Some(known) = keys_of_device(name) {
                let several =
                    value.get_ref().as_array().into_iter().flatten().filter_map(|v| v.get_ref().as_table());
                value
                    .get_ref()
                    .as_table()
                    .into_iter()
                    .chain(several)
                    .try_for_each(|t| check_keys(t, known))?;
            }
            continue;
        }
        let alike = known.iter().map(|k| (strsim::normalized_damerau_levenshtein(k, name), k));
        let hint = match alike.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((similarity, nearest)) if similarity >= ALIKE => format!("did you mean {nearest:?}?"),
            _ => format!("possible are {}", known.join(", ")),
        };
        return Err((key.span(), format!("unknown key {name:?}: {hint}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Engine;
    use berth_machine::options::ConsoleKind;

    fn reason(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        std::fs::write(&path, text).unwrap();
        let error = read(&path).unwrap_err().to_string();
        error.strip_prefix(&format!("VM file {}, ", path.display())).unwrap().to_owned()
    }

    #[test]
    fn every_key_is_an_option() {
        let text = r#"
            name = "web"
            engine = "soft"
            cpus = 4
            memory = "2G"
            image = "debian"
            ephemeral = true
            no-network = false
            kernel = "vmlinuz"
            initrd = "/boot/initrd"
            append = "quiet"
            no-default-guest = true
            no-reboot = true
            debug-exit = false
            store-dir = "store"
            code-cache = "16M"
            console = "virtio"
            rng = true
            disk = [{ path = "a.img", ro = true }, { path = "b.qcow2" }]
            net = [{ user = true, forward = ["tcp:8080:80"] }]
            vsock = { path = "v.sock", cid = 9 }
            balloon = { size = "64M" }
        "#;
        let keys = serde_introspect::<VmOptions>();
        assert!(keys.iter().all(|k| text.contains(&format!("{k} = "))), "not all of {keys:?} are tested");
        let expected = VmOptions {
            name: Some("web".parse().unwrap()),
            engine: Some(Engine::Soft),
            cpus: Some("4".parse().unwrap()),
            memory: Some(berth_machine::options::MemoryOptions::of_size(2 << 30)),
            image: Some("debian".parse().unwrap()),
            ephemeral: Some(true),
            no_network: Some(false),
            kernel: Some("vmlinuz".into()),
            initrd: Some("/boot/initrd".into()),
            append: Some("quiet".to_owned()),
            disk: vec!["a.img,ro".parse().unwrap(), "b.qcow2".parse().unwrap()],
            net: vec!["user,forward=tcp:8080:80".parse().unwrap()],
            vsock: Some("v.sock,cid=9".parse().unwrap()),
            balloon: Some("64M".parse().unwrap()),
            rng: Some(true),
            console: Some(ConsoleKind::Virtio),
            no_default_guest: Some(true),
            no_reboot: Some(true),
            debug_exit: Some(false),
            store_dir: Some("store".into()),
            code_cache: Some(16 << 20),
        };
        assert_eq!(parse(text), Ok(expected));
        assert_eq!(parse(""), Ok(VmOptions::default()));
    }

    #[test]
    fn relative_paths_are_those_of_the_files_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        let text = "kernel = 'k'\ninitrd = '/i'\ndisk = [{ path = 'd' }]\nvsock = { path = 'v' }\n\
            net = [{ user = true }, { socket = 's' }]";
        std::fs::write(&path, text).unwrap();
        let options = read(&path).unwrap();
        assert_eq!(options.disk[0].path, dir.path().join("d"));
        assert_eq!(options.vsock.unwrap().path, dir.path().join("v"));
        assert_eq!(options.net[1].socket, Some(dir.path().join("s")));
        assert_eq!(options.kernel, Some(dir.path().join("k")));
        assert_eq!(options.initrd, Some("/i".into()));
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_and_its_line() {
        for (text, said) in [
            ("name = 'a'\n\ncpu = 2\n", "line 3: unknown key \"cpu\": did you mean \"cpus\"?"),
            ("Memory = '1G'", "line 1: unknown key \"Memory\": did you mean \"memory\"?"),
            (
                "memory = '1G'\nno_reboot = true",
                "line 2: unknown key \"no_reboot\": did you mean \"no-reboot\"?",
            ),
            (
                "[[disk]]\npath = 'a'\nchace = 'none'",
                "line 3: unknown key \"chace\": did you mean \"cache\"?",
            ),
            ("vsock = { path = 'v',\n  cdi = 4 }", "line 2: unknown key \"cdi\": did you mean \"cid\"?"),
            ("[codecache]\nx = 1", "line 1: unknown key \"codecache\": did you mean \"code-cache\"?"),
        ] {
            assert_eq!(reason(text), said);
        }
        let said = reason("xyzzy = 1");
        assert!(said.starts_with("line 1: unknown key \"xyzzy\": possible are name, engine, "), "{said}");
    }

    #[test]
    fn impossible_values_are_refused_where_they_are() {
        for (text, line, said) in [
            ("name = 'a'\nmemory = '1P'\n", 2, "from 1 MiB to 511 GiB are possible"),
            ("memory = 512", 1, "expected a string"),
            ("\n\ncpus = 65", 3, "65 is not in 1..=64"),
            ("cpus = -1", 1, "-1 is not in 1..=64"),
            ("cpus = '2'", 1, "a number of vCPUs"),
            ("engine = 'warp'", 1, "`auto`, `soft`, `kvm`"),
            ("name = '../x'", 1, "begins with a letter"),
            ("no-reboot = 1", 1, "expected a boolean"),
            ("[[disk]]\npath = 'a'\ncache = 'unsafe'", 3, "`writeback`"),
            ("[[disk]]\nro = true", 1, "disk: the key path is missing"),
            ("[vsock]\npath = 'v'\ncid = 1", 1, "vsock: cid: 1"),
            ("disk = 'a'", 1, "expected"),
            ("name = 'a'\nname = 'b'", 2, "duplicate key"),
            ("name = 'a'\n=", 2, ""),
            ("\"", 1, ""),
        ] {
            let reason = reason(text);
            assert!(reason.starts_with(&format!("line {line}: ")), "{text}: {reason}");
            assert!(reason.contains(said), "{text}: {reason}");
            assert!(!reason.contains('\n'), "{text}: {reason}");
        }
    }

    #[test]
    fn files_that_are_no_text_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert!(matches!(read(&path), Err(VmFileError::Read { .. })));
        std::fs::write(&path, [0xff; 100]).unwrap();
        assert!(matches!(read(&path), Err(VmFileError::Read { .. })));
        std::fs::write(&path, vec![b'#'; 2 << 20]).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("more than"));
    }

    /// The documentation has a line for each key, and no others.
    #[test]
    fn the_documentation_has_all_keys() {
        let page = include_str!("../../../docs/vm-file.md");
        let documented: Vec<&str> =
            page.lines().filter_map(|l| l.strip_prefix("| `")?.split_once('`')).map(|(key, _)| key).collect();
        let mut keys = serde_introspect::<VmOptions>().to_vec();
        for device in ["disk", "net", "vsock", "balloon"] {
            keys.extend(keys_of_device(device).unwrap());
        }
        assert_eq!(documented, keys);
        let example = page.split("```toml\n").nth(1).and_then(|t| t.split("```").next()).unwrap();
        parse(example).unwrap();
    }
}

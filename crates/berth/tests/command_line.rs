//! The command as users and scripts see it: what it prints and how it exits.

use std::path::Path;
use std::process::{Command, Output};

fn berth(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_berth")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn bad_arguments_exit_with_2_and_name_what_was_bad() {
    for (arguments, named) in [
        (&["run", "--memory", "0"][..], "'0'"),
        (&["run", "--memory", "1K"], "from 1 MiB to"),
        (&["run", "--memory", "1P"], "from 1 MiB to"),
        (&["run", "--memory", "many"], "not a size"),
        (&["run", "--cpus", "65"], "from 1 to 64"),
        (&["run", "--cpus", "-1"], "-1"),
        (&["run", "--engine", "warp"], "auto, soft, kvm"),
        (&["run", "--name", "a/b"], "'a/b'"),
        (&["run", "--net", "user,id=x", "--disk", "a.img,id=x"], "two devices have the id \"x\""),
        (&["run", "--disk", "a.img,id=disk1", "--disk", "b.img"], "\"disk1\""),
        (&["run", "--net", "user,tap=t0"], "user and tap"),
        (&["run", "--net", "tap=t0", "--net", "tap=t0"], "net0 and net1"),
        (&["run", "--net", "tap=t0,forward=tcp:80:80"], "only user networking forwards"),
        (
            &["run", "--net", "user,forward=tcp:80:80,forward=tcp:80:81"],
            "forward=tcp:80:80 and forward=tcp:80:81",
        ),
        (&["run", "--disk", "a.img", "--disk", "a.img,ro"], "disk0 and disk1"),
        (&["run", "--disk", "a.img", "--ephemeral"], "--ephemeral needs --image"),
        (&["run", "--memory", "256M", "--balloon=size=257M"], "size=257 MiB is more than --memory 256 MiB"),
        (&["run", "--no-default-guest"], "--kernel"),
        (&["run", "extra"], "extra"),
        (&["disk", "create", "a.img"], "SIZE"),
        (&["disk", "create", "a.img", "1"], "from 512 B to 1048576 TiB"),
        (&["disk", "create", "a.img", "--backing", "b.img"], "--backing needs --format qcow2"),
        (&["disk", "create", "a.qcow2", "1M", "--backing-format", "raw"], "--backing"),
        (&["image", "import", "a.img", "--initrd", "i"], "--kernel"),
        (&["sink"], "sink"),
    ] {
        let output = berth(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(named), "{arguments:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn bad_files_exit_with_1_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("empty"), b"").unwrap();
    std::fs::write(
        path("noise"),
        (0..100_000u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect::<Vec<_>>(),
    )
    .unwrap();
    for kernel in ["missing", "empty", "noise", "."] {
        let output = berth(&["run", "--kernel", &path(kernel)]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{kernel}: {said}");
        assert_eq!(said.lines().count(), 1, "{kernel}: {said}");
        assert!(said.starts_with("berth: error: "), "{kernel}: {said}");
        assert!(!said.contains("panicked"), "{kernel}: {said}");
    }
}

#[test]
fn without_apt_the_default_guest_says_how_to_name_another() {
    let cache = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_berth"))
        .arg("run")
        .env("XDG_CACHE_HOME", cache.path())
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--kernel") && said.contains("--initrd"), "{said}");
}

#[test]
fn host_reports_for_people_and_programs() {
    let people = berth(&["host"]);
    assert!(people.status.success());
    for label in
        ["engine", "CPU", "/dev/kvm", "memory", "huge pages", "KSM", "swap", "userfaultfd", "cgroups"]
    {
        assert!(text(&people.stdout).lines().any(|l| l.starts_with(label)), "no {label}");
    }
    let programs = berth(&["host", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&programs.stdout).unwrap();
    assert_eq!(json["engine"]["engine"], "soft");
    assert!(json["cpu"]["online"].as_u64().unwrap() >= 1);
}

#[test]
fn help_version_and_completions() {
    let help = text(&berth(&["run", "--help"]).stdout);
    for word in ["--memory", "Ctrl-A x", "10 seconds", "Exit code"] {
        assert!(help.contains(word), "no {word} in:\n{help}");
    }
    assert_eq!(text(&berth(&["--version"]).stdout), format!("berth {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = text(&berth(&["completions", shell]).stdout);
        assert!(script.contains("BERTH_COMPLETE") && script.contains(env!("CARGO_BIN_EXE_berth")), "{shell}");
    }
    assert_eq!(berth(&["completions", "csh"]).status.code(), Some(2));
}

/// What bash offers for the last of these words, with the script that `berth` printed for it.
fn completions_in_bash(data: &Path, words: &[&str]) -> Option<Vec<String>> {
    let script = text(&berth(&["completions", "bash"]).stdout);
    let words: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
    let (last, index) = (words.last().unwrap(), words.len() - 1);
    let commands = format!(
        "{script}\nCOMP_WORDS=({})\nCOMP_CWORD={index}\nCOMP_TYPE=9\n_clap_complete_berth berth {last}\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words.join(" "),
    );
    match Command::new("bash").arg("-c").arg(commands).env("XDG_DATA_HOME", data).output() {
        Ok(output) => Some(text(&output.stdout).lines().map(|l| l.trim().to_owned()).collect()),
        Err(_) => {
            println!("skipped: there is no bash");
            None
        }
    }
}

#[test]
fn shells_complete_options_and_names_of_images() {
    let data = tempfile::tempdir().unwrap();
    let path = |name: &str| data.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("disk"), [0; 4096]).unwrap();
    std::fs::write(path("kernel"), b"kernel").unwrap();
    for name in ["one", "two"] {
        let arguments = ["image", "import", &path("disk"), "--kernel", &path("kernel"), "--name", name];
        assert!(berth_with(data.path(), &arguments).status.success());
    }
    let Some(options) = completions_in_bash(data.path(), &["berth", "run", "--no-r"]) else { return };
    assert_eq!(options, ["--no-reboot"]);
    assert_eq!(completions_in_bash(data.path(), &["berth", "image", "rm", ""]).unwrap()[..2], ["one", "two"]);
    assert_eq!(completions_in_bash(data.path(), &["berth", "image", "rm", "t"]).unwrap(), ["two"]);
}

fn berth_with(data: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.args(arguments).env("XDG_DATA_HOME", data).output().unwrap()
}

#[test]
fn images_are_imported_listed_and_removed() {
    let data = tempfile::tempdir().unwrap();
    let path = |name: &str| data.path().join(name).to_str().unwrap().to_owned();
    let run = |arguments: &[&str]| berth_with(data.path(), arguments);
    std::fs::write(path("disk.raw"), [7; 4096]).unwrap();
    std::fs::write(path("kernel"), b"kernel").unwrap();
    assert!(text(&run(&["image", "ls"]).stdout).contains("berth image build"));
    assert_eq!(text(&run(&["image", "ls", "--json"]).stdout), "[]\n");

    let output = run(&[
        "image",
        "import",
        &path("disk.raw"),
        "--kernel",
        &path("kernel"),
        "--append",
        "root=/dev/sda",
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&run(&["image", "ls", "--json"]).stdout).unwrap();
    assert_eq!(json[0]["name"], "disk");
    assert_eq!(json[0]["size"], 4096);
    assert_eq!(json[0]["cmdline"], "root=/dev/sda");
    assert_eq!(std::fs::read(json[0]["disk"].as_str().unwrap()).unwrap(), [7; 4096]);
    let table = text(&run(&["image", "ls"]).stdout);
    assert!(table.lines().nth(1).unwrap().starts_with("disk ") && table.contains("4 KiB"), "{table}");

    let again = run(&["image", "import", &path("disk.raw"), "--kernel", &path("kernel")]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("berth image rm disk"), "{}", text(&again.stderr));
    assert!(run(&["image", "rm", "disk"]).status.success());
    let gone = run(&["image", "rm", "disk"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("there is no image disk"), "{}", text(&gone.stderr));
}

#[test]
fn building_says_which_package_is_missing() {
    let data = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_berth"))
        .args(["image", "build", "debian"])
        .env("XDG_DATA_HOME", data.path())
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("install the package mmdebstrap"), "{said}");
    assert_eq!(berth(&["image", "build", "debian", "--size", "1M"]).status.code(), Some(2));
    assert_eq!(berth(&["image", "build", "debian", "--package", "--x"]).status.code(), Some(2));
}

#[test]
fn a_bad_log_filter_is_no_obstacle() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_berth")).arg("host").env("BERTH_LOG", "==x==").output().unwrap();
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("BERTH_LOG"));
}

#[test]
fn a_vm_file_that_makes_no_sense_exits_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.toml");
    let run = || berth(&["run", "-f", path.to_str().unwrap()]);
    assert_eq!(run().status.code(), Some(1), "there is no such file");
    std::fs::write(&path, "memory = '1G'\ncpu = 2\n").unwrap();
    let output = run();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let expected = format!(
        "berth: error: VM file {}, line 2: unknown key \"cpu\": did you mean \"cpus\"?\n",
        path.display()
    );
    assert_eq!(said, expected);
}

#[test]
fn a_vm_file_describes_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.toml");
    std::fs::write(&path, "kernel = 'missing'\nengine = 'soft'\n").unwrap();
    let output = berth(&["run", "--file", path.to_str().unwrap()]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&format!("kernel {}: cannot be read", dir.path().join("missing").display())),
        "{said}"
    );
    // The command line wins.
    let output = berth(&["run", "--file", path.to_str().unwrap(), "--kernel", "/other"]);
    assert!(text(&output.stderr).contains("kernel /other: "), "{}", text(&output.stderr));
}

use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn vms() -> (tempfile::TempDir, Vms) {
    let directory = tempfile::tempdir().unwrap();
    let vms = Vms::at(directory.path().join("berth")).unwrap();
    (directory, vms)
}

#[test]
fn a_name_is_one_vms_and_free_after_it() {
    let (_directory, vms) = vms();
    let claim = vms.claim("web").unwrap();
    assert!(vms.get("web").unwrap().is_alive());
    let error = vms.claim("web").unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    assert!(matches!(vms.get("web").unwrap().remove(), Err(RuntimeError::Runs { .. })));
    drop(claim);
    assert!(matches!(vms.get("web"), Err(RuntimeError::Unknown { .. })));
    assert_eq!(std::fs::read_dir(vms.path()).unwrap().count(), 0, "something is left");
    vms.claim("web").unwrap();
}

#[test]
fn a_dead_vm_is_seen_as_such_and_its_name_can_be_used_again() {
    let (_directory, vms) = vms();
    let directory = vms.path().join("web");
    std::fs::create_dir(&directory).unwrap();
    for file in ["lock", "vm.json", "console.log"] {
        std::fs::write(directory.join(file), "1234").unwrap();
    }
    drop(socket::listen(&directory.join("api.sock")).unwrap());
    let vm = vms.get("web").unwrap();
    assert!(!vm.is_alive());
    vm.sweep().unwrap();
    assert!(!directory.join("api.sock").exists() && directory.join("console.log").exists());
    let claim = vms.claim("web").unwrap();
    assert!(!directory.join("console.log").exists());
    assert_eq!(vm.pid(), Some(std::process::id()));
    drop(claim);
    assert!(!directory.exists());
}

#[test]
fn what_is_kept_is_there_until_it_is_removed() {
    let (_directory, vms) = vms();
    let mut claim = vms.claim("web").unwrap();
    let ending = crate::types::Ending { at: 1.5, exit_code: 3, reason: "so".to_owned() };
    claim.keep(&ending).unwrap();
    drop(claim);
    let vm = vms.get("web").unwrap();
    assert_eq!(vm.ending(), Some(ending));
    vm.remove().unwrap();
    assert!(vms.all().is_empty());
}

#[test]
fn names_do_not_leave_the_directory() {
    let (_directory, vms) = vms();
    for name in ["", ".", "..", "../x", "a/b", ".hidden", "a\0b"] {
        assert!(matches!(vms.claim(name), Err(RuntimeError::BadName { .. })), "{name:?}");
        assert!(vms.get(name).is_err(), "{name:?}");
    }
}

#[test]
fn a_directory_that_others_can_touch_is_refused() {
    let outer = tempfile::tempdir().unwrap();
    let open = outer.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = Vms::at(open.clone()).unwrap_err().to_string();
    assert!(error.contains("chmod 700"), "{error}");
    let link = outer.path().join("link");
    symlink(outer.path(), &link).unwrap();
    assert!(Vms::at(link).is_err());
    let file = outer.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(Vms::at(file).is_err());
}

#[test]
fn many_can_look_while_one_claims() {
    let (_directory, vms) = vms();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                for vm in vms.all() {
                    vm.is_alive();
                }
            }
        });
        for _ in 0..200 {
            drop(vms.claim("web").unwrap());
        }
        done.store(true, std::sync::atomic::Ordering::Release);
    });
}

#[test]
fn sockets_have_paths_of_any_length() {
    let outer = tempfile::tempdir().unwrap();
    let deep = outer.path().join("x".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let path = deep.join("api.sock");
    let listener = socket::listen(&path).unwrap();
    socket::connect(&path).unwrap();
    assert!(socket::listen(&path).is_err(), "somebody listens there");
    drop(listener);
    socket::listen(&path).unwrap();
}

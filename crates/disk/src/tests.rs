//! Images against a model in memory, and against qemu-img where that is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use vm_memory::VolatileSlice;

use super::*;

const MIB: u64 = 1 << 20;

/// Runs qemu-img, or says that it is not there.
fn qemu_img(arguments: &[&str]) -> Option<String> {
    let Ok(output) = Command::new("qemu-img").args(arguments).output() else {
        println!("skipped: qemu-img is not installed");
        return None;
    };
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
    Some(said)
}

fn check(path: &Path) {
    qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn options(path: &Path, format: Format) -> OpenOptions {
    OpenOptions { path: path.to_owned(), format: Some(format), read_only: false, cache: CacheMode::Writeback }
}

fn new_image(directory: &Path, format: Format, size: u64) -> PathBuf {
    let path = directory.join(format!("image.{format}"));
    create(&CreateOptions { path: path.clone(), format, size: Some(size), backing: None }).unwrap();
    path
}

fn write(image: &dyn Image, offset: u64, data: &mut [u8]) {
    image.write(&[VolatileSlice::from(data)], offset).unwrap();
}

fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    image.read(&[VolatileSlice::from(&mut data[..])], offset).unwrap();
    data
}

/// Random requests to an image and to a copy in memory.
fn compare_with_model(image: &dyn Image, model: &mut Vec<u8>, rounds: usize) {
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..rounds {
        let sectors = model.len() as u64 / SECTOR_SIZE;
        let first = random.u64(..sectors);
        let count = random.u64(1..=(sectors - first).min(300));
        let (offset, len) = (first * SECTOR_SIZE, count * SECTOR_SIZE);
        let range = offset as usize..(offset + len) as usize;
        match random.u8(..10) {
            0..4 => {
                let mut data: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(len as usize).collect();
                model[range].copy_from_slice(&data);
                // In two pieces, as a driver's buffers come.
                let (a, b) = data.split_at_mut(random.usize(..=len as usize));
                image.write(&[VolatileSlice::from(a), VolatileSlice::from(b)], offset).unwrap();
            }
            4..8 => assert!(read(image, offset, len as usize) == model[range], "{len} bytes at {offset}"),
            8 => {
                image.write_zeroes(offset, len, random.bool()).unwrap();
                model[range].fill(0);
            }
            _ => image.flush().unwrap(),
        }
    }
    assert!(read(image, 0, model.len()) == *model);
}

#[test]
fn formats_and_cache_modes_keep_what_was_written() {
    for format in [Format::Raw, Format::Qcow2] {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            let directory = tempfile::tempdir().unwrap();
            let path = new_image(directory.path(), format, 4 * MIB);
            let image = open(&OpenOptions { cache, ..options(&path, format) }).unwrap();
            let mut model = vec![0; 4 << 20];
            compare_with_model(image.as_ref(), &mut model, 300);
            image.grow(5 * MIB).unwrap();
            model.resize(5 << 20, 0);
            compare_with_model(image.as_ref(), &mut model, 100);
            image.flush().unwrap();
            drop(image);
            let raw = directory.path().join("model");
            std::fs::write(&raw, &model).unwrap();
            qemu_img(&["compare", "-f", "raw", "-F", format.name(), text(&raw), text(&path)]);
            if format == Format::Qcow2 {
                check(&path);
            }
        }
    }
}

#[test]
fn overlays_leave_their_backing_file_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let base = new_image(directory.path(), Format::Qcow2, MIB);
    let image = open(&options(&base, Format::Qcow2)).unwrap();
    write(image.as_ref(), 0, &mut [1; 4096]);
    write(image.as_ref(), 512 << 10, &mut [2; 4096]);
    image.flush().unwrap();
    drop(image);
    let before = std::fs::read(&base).unwrap();

    let overlay = directory.path().join("overlay.qcow2");
    let backing = Some((base.clone(), Format::Qcow2));
    create(&CreateOptions { path: overlay.clone(), format: Format::Qcow2, size: None, backing }).unwrap();
    let image = open(&options(&overlay, Format::Qcow2)).unwrap();
    // Two readers of the backing file can be, a writer cannot.
    let second = directory.path().join("second.qcow2");
    let backing = Some((base.clone(), Format::Qcow2));
    create(&CreateOptions { path: second.clone(), format: Format::Qcow2, size: Some(2 * MIB), backing })
        .unwrap();
    let other = open(&options(&second, Format::Qcow2)).unwrap();
    assert!(matches!(open(&options(&base, Format::Qcow2)), Err(DiskError::InUse { .. })));

    assert_eq!(read(image.as_ref(), 0, 4096), [1; 4096]);
    write(image.as_ref(), 512, &mut [3; 512]);
    image.write_zeroes(512 << 10, 4096, true).unwrap();
    assert_eq!(read(image.as_ref(), 0, 1024), [[1; 512], [3; 512]].concat());
    assert_eq!(read(image.as_ref(), 512 << 10, 4096), [0; 4096]);
    assert_eq!(read(other.as_ref(), 512, 512), [1; 512]);
    assert_eq!(read(other.as_ref(), MIB, 512), [0; 512]);
    image.flush().unwrap();
    drop((image, other));
    assert!(std::fs::read(&base).unwrap() == before);
    check(&overlay);
    let found = info(&overlay, None).unwrap();
    assert_eq!(found.backing, Some(base.canonicalize().unwrap()));
    assert_eq!((found.size, found.backing_format.as_deref()), (MIB, Some("qcow2")));
}

#[test]
fn images_of_qemu_img_are_read_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, image) = (directory.path().join("a.img"), directory.path().join("a.qcow2"));
    let content: Vec<u8> = (0..MIB).map(|i| if i & 0x1_0000 == 0 { (i >> 9) as u8 } else { 0 }).collect();
    std::fs::write(&raw, &content).unwrap();
    for extra in [&[][..], &["-c"], &["-o", "compat=0.10"], &["-o", "cluster_size=512"]] {
        let arguments: Vec<&str> = ["convert", "-f", "raw", "-O", "qcow2"]
            .into_iter()
            .chain(extra.iter().copied())
            .chain([text(&raw), text(&image)])
            .collect();
        if qemu_img(&arguments).is_none() {
            return;
        }
        let opened = open(&options(&image, Format::Qcow2)).unwrap();
        let mut model = content.clone();
        assert!(read(opened.as_ref(), 0, model.len()) == model, "{extra:?}");
        compare_with_model(opened.as_ref(), &mut model, 200);
        drop(opened);
        check(&image);
        let changed = directory.path().join("changed.img");
        std::fs::write(&changed, &model).unwrap();
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&changed), text(&image)]);
    }
}

#[test]
fn conversion_keeps_content_and_holes() {
    let directory = tempfile::tempdir().unwrap();
    let source = new_image(directory.path(), Format::Raw, 8 * MIB);
    let image = open(&options(&source, Format::Raw)).unwrap();
    write(image.as_ref(), 3 * MIB, &mut [9; 8192]);
    drop(image);
    let (qcow2, back) = (directory.path().join("b.qcow2"), directory.path().join("b.img"));
    let mut told = Vec::new();
    convert(&source, None, &qcow2, Format::Qcow2, |done, all| told.push((done, all))).unwrap();
    assert_eq!(told.last(), Some(&(8 * MIB, 8 * MIB)));
    convert(&qcow2, None, &back, Format::Raw, |_, _| {}).unwrap();
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&back).unwrap());
    assert!(info(&back, None).unwrap().allocated < MIB);
    check(&qcow2);
    assert!(matches!(convert(&source, None, &back, Format::Raw, |_, _| {}), Err(DiskError::Exists { .. })));
}

#[test]
fn sizes_change_at_rest() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = new_image(directory.path(), format, 2 * MIB);
        resize(&path, None, 3 * MIB, false).unwrap();
        assert!(matches!(resize(&path, None, MIB, false), Err(DiskError::Shrink { .. })));
        assert_eq!(info(&path, None).unwrap().size, 3 * MIB);
        resize(&path, None, MIB, true).unwrap();
        assert_eq!(info(&path, None).unwrap().size, MIB);
        assert!(matches!(resize(&path, None, 1000, false), Err(DiskError::BadSize { size: 1000 })));
    }
    check(&directory.path().join("image.qcow2"));
}

#[test]
fn what_is_no_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("odd.img");
    std::fs::write(&path, [0; 1000]).unwrap();
    assert!(matches!(info(&path, None), Err(DiskError::BadLength { size: 1000, .. })));
    let error = info(&path, Some(Format::Qcow2)).unwrap_err().to_string();
    assert!(error.contains("odd.img"), "{error}");
    let disguised = directory.path().join("disguised.img");
    std::fs::copy(new_image(directory.path(), Format::Qcow2, MIB), &disguised).unwrap();
    assert!(matches!(info(&disguised, None), Err(DiskError::Ambiguous { .. })));
    assert_eq!(info(&disguised, Some(Format::Qcow2)).unwrap().size, MIB);
    assert!(matches!(
        info(directory.path(), Some(Format::Raw)),
        Err(DiskError::NotAFile { .. } | DiskError::File { .. })
    ));
    let backing = Some((path.clone(), Format::Raw));
    let create_raw =
        CreateOptions { path: directory.path().join("x"), format: Format::Raw, size: None, backing };
    assert!(matches!(create(&create_raw), Err(DiskError::RawWithBacking)));
}

#[test]
fn damaged_qcow2_headers_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = new_image(directory.path(), Format::Qcow2, MIB);
    let good = std::fs::read(&path).unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..300 {
        let mut bad = good.clone();
        for _ in 0..random.usize(1..8) {
            bad[random.usize(4..112)] = random.u8(..);
        }
        let damaged = directory.path().join("damaged.qcow2");
        std::fs::write(&damaged, &bad).unwrap();
        // Any answer but a panic; what opens can be read.
        if let Ok(image) = open(&OpenOptions { read_only: true, ..options(&damaged, Format::Qcow2) })
            && image.size() >= 512
        {
            let mut data = [0; 512];
            let _ = image.read(&[VolatileSlice::from(&mut data[..])], 0);
        }
    }
}

#[test]
fn requests_outside_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = new_image(directory.path(), format, MIB);
        let image = open(&options(&path, format)).unwrap();
        let mut data = [0; 1024];
        for offset in [MIB, MIB - 512, u64::MAX - 511] {
            assert!(image.read(&[VolatileSlice::from(&mut data[..])], offset).is_err(), "{format} {offset}");
            assert!(image.write(&[VolatileSlice::from(&mut data[..])], offset).is_err(), "{format} {offset}");
            assert!(image.discard(offset, 1024).is_err());
            assert!(image.write_zeroes(offset, 1024, true).is_err());
        }
        assert!(image.grow(512).is_err());
        assert!(image.grow(MIB + 1).is_err());
    }
}

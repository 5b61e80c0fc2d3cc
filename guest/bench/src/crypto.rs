//! SHA-256 and AES-128, each with the CPU's instructions for it and without.

use std::hint::black_box;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes_plain::cipher as plain_cipher;
use plain_cipher::{BlockDecrypt, BlockEncrypt, NewBlockCipher};
use sha2::Digest;

use crate::{Outcome, Stop, Task, expect};

/// Of a million times "a" (FIPS 180-2, appendix B.3).
const MILLION_A: [u8; 32] = [
    0xcd, 0xc7, 0x6e, 0x5c, 0x99, 0x14, 0xfb, 0x92, 0x81, 0xa1, 0xc7, 0xe2, 0x84, 0xd7, 0x3e, 0x67, 0xf1,
    0x80, 0x9a, 0x48, 0xa4, 0x97, 0x20, 0x0e, 0x04, 0x6d, 0x39, 0xcc, 0xc7, 0x11, 0x2c, 0xd0,
];
/// Key, text and cipher text of FIPS 197, appendix B.
const KEY: u128 = 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c;
const TEXT: u128 = 0x3243_f6a8_885a_308d_3131_98a2_e037_0734;
const CIPHER: u128 = 0x3925_841d_02dc_09fb_dc11_8597_196a_0b32;
/// Blocks of 16 bytes.
const BLOCKS: usize = 16 << 10;

pub fn sha256_plain(task: &Task) -> Outcome {
    hash(task, |message| <sha2_plain::Sha256 as sha2_plain::Digest>::digest(message).into())
}

pub fn sha256_instructions(task: &Task) -> Outcome {
    if !is_x86_feature_detected!("sha") {
        return Err(Stop::Skipped("the CPU has no SHA extensions".to_owned()));
    }
    hash(task, |message| sha2::Sha256::digest(message).into())
}

fn hash(task: &Task, digest: impl Fn(&[u8]) -> [u8; 32]) -> Outcome {
    let message = vec![b'a'; 1_000_000];
    (0..task.count).try_for_each(|_| expect("the digest", digest(black_box(&message)), MILLION_A))
}

pub fn aes_plain(task: &Task) -> Outcome {
    let cipher = aes_plain::Aes128::new(&KEY.to_be_bytes().into());
    to_and_fro(
        task,
        TEXT.to_be_bytes().into(),
        |blocks: &mut [aes_plain::Block]| cipher.encrypt_blocks(blocks),
        |blocks| cipher.decrypt_blocks(blocks),
    )
}

pub fn aes_instructions(task: &Task) -> Outcome {
    if !is_x86_feature_detected!("aes") {
        return Err(Stop::Skipped("the CPU has no AES instructions".to_owned()));
    }
    let cipher = aes::Aes128::new(&KEY.to_be_bytes().into());
    to_and_fro(
        task,
        TEXT.to_be_bytes().into(),
        |blocks: &mut [aes::Block]| cipher.encrypt_blocks(blocks),
        |blocks| cipher.decrypt_blocks(blocks),
    )
}

fn to_and_fro<Block: AsRef<[u8]> + Clone>(
    task: &Task,
    text: Block,
    encrypt: impl Fn(&mut [Block]),
    decrypt: impl Fn(&mut [Block]),
) -> Outcome {
    let mut blocks = vec![text; BLOCKS];
    let all = |blocks: &[Block], right: u128| blocks.iter().all(|b| *b.as_ref() == right.to_be_bytes());
    for _ in 0..task.count {
        encrypt(black_box(&mut blocks));
        expect("the cipher text", all(&blocks, CIPHER), true)?;
        decrypt(black_box(&mut blocks));
        expect("the text", all(&blocks, TEXT), true)?;
    }
    Ok(())
}

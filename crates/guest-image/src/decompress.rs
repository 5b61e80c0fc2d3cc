//! Compressed data of kernels and modules, recognised by its first bytes.

use std::io::Read;

/// Formats that kernels and modules of distributions come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// RFC 1952.
    Gzip,
    /// The .xz file format 1.2, also with the filter for x86 code.
    Xz,
    /// RFC 8878.
    Zstd,
    /// LZ4's legacy frame format: blocks of 8 MiB without an end mark.
    Lz4Legacy,
}

impl Format {
    /// The format of `data`, if it is one of these.
    pub fn of(data: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Format); 4] = [
            (b"\x1f\x8b\x08", Format::Gzip),
            (b"\xfd7zXZ\0", Format::Xz),
            (b"\x28\xb5\x2f\xfd", Format::Zstd),
            (b"\x02\x21\x4c\x18", Format::Lz4Legacy),
        ];
        MAGICS.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, format)| *format)
    }

    /// Unpacks `data`, which has nothing but this format.
    ///
    /// # Errors
    /// For people: damaged data, or contents of more than `limit` bytes.
    pub fn unpack(self, data: &[u8], limit: u64) -> Result<Vec<u8>, String> {
        match self {
            Self::Gzip => read(flate2::read::GzDecoder::new(data), limit),
            Self::Xz => read(lzma_rust2::XzReader::new(data, true), limit),
            Self::Zstd => {
                read(ruzstd::decoding::StreamingDecoder::new(data).map_err(|e| e.to_string())?, limit)
            }
            Self::Lz4Legacy => read(lz4_flex::frame::FrameDecoder::new(data), limit),
        }
    }
}

fn read(from: impl Read, limit: u64) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    from.take(limit.saturating_add(1)).read_to_end(&mut content).map_err(|e| e.to_string())?;
    if content.len() as u64 > limit {
        return Err(format!("it unpacks to more than {limit} bytes"));
    }
    Ok(content)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    /// `content` in LZ4's legacy format.
    pub fn lz4_legacy(content: &[u8]) -> Vec<u8> {
        let blocks = content.chunks(8 << 20).map(lz4_flex::block::compress);
        let sized = blocks.map(|block| [&(block.len() as u32).to_le_bytes(), &block[..]].concat());
        [b"\x02\x21\x4c\x18".to_vec(), sized.collect::<Vec<_>>().concat()].concat()
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    /// `printf '%s' "xz and zstd" | xz --check=crc32 --x86 --lzma2`, as the kernel's build packs its image.
    const XZ: &[u8] = include_bytes!("../tests/words.xz");
    /// The same with `zstd`.
    const ZSTD: &[u8] = include_bytes!("../tests/words.zst");

    #[test]
    fn every_format_gives_back_what_was_packed() {
        let text = b"berth ".repeat(3 << 20);
        for packed in [lz4_legacy(&text), gzip(&text)] {
            assert!(Format::of(&packed).unwrap().unpack(&packed, text.len() as u64).unwrap() == text);
        }
        for packed in [XZ, ZSTD] {
            assert_eq!(Format::of(packed).unwrap().unpack(packed, 100).unwrap(), b"xz and zstd");
        }
        assert_eq!(Format::of(b"\x7fELF"), None);
    }

    #[test]
    fn contents_above_the_limit_are_refused() {
        let packed = gzip(&[0; 1000]);
        assert!(Format::Gzip.unpack(&packed, 999).unwrap_err().contains("999"));
    }

    #[test]
    fn damage_is_an_error() {
        let text = b"some words, ".repeat(100);
        for mut packed in [gzip(&text), XZ.to_vec()] {
            let format = Format::of(&packed).unwrap();
            let middle = packed.len() / 2;
            packed[middle] ^= 0x55;
            assert!(format.unpack(&packed, 1 << 20).is_err(), "{format:?}");
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

//! Layers as stored: plain, gzip or zstd, told apart by their first bytes as other tools do it.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Formats that begin unmistakably and that layers are not stored in.
const UNSUPPORTED: &[(&[u8], &str)] = &[
    (b"BZh", "bzip2"),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
    (&[0x04, 0x22, 0x4d, 0x18], "lz4"),
    (b"hsqs", "squashfs"),
];

/// Window of zstd, as a power of two: 128 MiB, what its own tool accepts without being asked.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The decompressed bytes of `source`, whichever of the three it is.
///
/// # Errors
/// When its first bytes cannot be read or are of a format that is not supported.
pub fn decompress<'a>(mut source: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = source.fill_buf()?;
    if let Some((_, name)) = UNSUPPORTED
        .iter()
        .find(|(magic, _)| start.starts_with(magic))
    {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("it is compressed by {name}, which is not supported (gzip, zstd and none are)"),
        ));
    }
    if start.starts_with(GZIP_MAGIC) {
        return Ok(Box::new(MultiGzDecoder::new(source)));
    }
    if start.starts_with(ZSTD_MAGIC) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(source))
}

/// Are these the first bytes of something that [`decompress`] decompresses?
#[must_use]
pub fn is_compressed(start: &[u8]) -> bool {
    start.starts_with(GZIP_MAGIC) || start.starts_with(ZSTD_MAGIC)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write as _;

    use super::*;

    pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn plain_gzip_and_zstd_read_back_also_in_several_parts() {
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        assert_eq!(read(b"abc").unwrap(), b"abc");
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(&gzip(b"abc")).unwrap(), b"abc");
        assert_eq!(read(&zstd(b"abc")).unwrap(), b"abc");
        // eStargz and zstd:chunked are made of many members; the latter ends in a frame to be skipped.
        assert_eq!(
            read(&[gzip(b"abc"), gzip(b"def")].concat()).unwrap(),
            b"abcdef"
        );
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        assert_eq!(
            read(&[zstd(b"abc"), zstd(b"def"), skipped].concat()).unwrap(),
            b"abcdef"
        );
    }

    #[test]
    fn cut_or_unknown_compression_is_an_error() {
        let whole = gzip(&[7; 1000]);
        assert!(read(&whole[..whole.len() - 1]).is_err());
        let whole = zstd::encode_all(&[7; 1000][..], 1).unwrap();
        assert!(read(&whole[..whole.len() - 1]).is_err());
        let error = read(b"BZh91AY&SY").unwrap_err();
        assert!(error.to_string().contains("bzip2"), "{error}");
    }
}

//! What a block of a Blosc2 chunk is packed with: codecs that make it smaller, and filters that put bytes into another
//! order before.

use std::io::Read;

use flate2::read::ZlibDecoder;
use ruzstd::decoding::StreamingDecoder;

/// Unpacks `packed` into all of `out`.
///
/// # Errors
/// What is wrong: damage, or a codec that there is none of here.
pub(super) fn unpack(codec: u8, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
    let n = match codec {
        0 => blosclz(packed, out).ok_or("damaged BloscLZ data")?,
        // LZ4HC writes the same form.
        1 => lz4_flex::block::decompress_into(packed, out).map_err(|e| format!("damaged LZ4 data: {e}"))?,
        3 => {
            let mut decoder = ZlibDecoder::new(packed);
            decoder.read_exact(out).map_err(|e| format!("damaged zlib data: {e}"))?;
            out.len()
        }
        4 => {
            let damaged = |e: &dyn std::fmt::Display| format!("damaged Zstandard data: {e}");
            let mut decoder = StreamingDecoder::new(packed).map_err(|e| damaged(&e))?;
            decoder.read_exact(out).map_err(|e| damaged(&e))?;
            out.len()
        }
        other => return Err(format!("packed with codec {other}; BloscLZ, LZ4, LZ4HC, zlib and Zstandard are read")),
    };
    if n == out.len() { Ok(()) } else { Err(format!("a block of {n} bytes, expected {}", out.len())) }
}

/// BloscLZ: runs of literals, and matches of at least three bytes at up to 8191 + 65535 bytes back. Returns how much was
/// written.
fn blosclz(packed: &[u8], out: &mut [u8]) -> Option<usize> {
    const NEAR: usize = 8191;
    let mut input = packed.iter();
    let mut at = 0usize;
    let mut control = usize::from(input.next()? & 31);
    loop {
        if control >= 32 {
            let (mut len, high) = ((control >> 5) - 1, (control & 31) << 8);
            if len == 6 {
                loop {
                    let more = *input.next()?;
                    len += usize::from(more);
                    if more != 255 {
                        break;
                    }
                }
            }
            len += 3;
            let low = usize::from(*input.next()?);
            let mut back = high + low;
            if back == NEAR {
                back += usize::from(*input.next()?) << 8;
                back += usize::from(*input.next()?);
            }
            let from = at.checked_sub(back + 1)?;
            let end = at.checked_add(len).filter(|&e| e <= out.len())?;
            // It may reach into what it writes.
            for i in 0..end - at {
                out[at + i] = out[from + i];
            }
            at = end;
        } else {
            let len = control + 1;
            let target = out.get_mut(at..at + len)?;
            let source = input.as_slice().get(..len)?;
            target.copy_from_slice(source);
            input = input.as_slice()[len..].iter();
            at += len;
        }
        match input.next() {
            Some(next) => control = usize::from(*next),
            None => return Some(at),
        }
    }
}

/// Undoes the byte shuffle: all first bytes of the elements lie before all second ones.
pub(super) fn unshuffle(size: usize, from: &[u8], to: &mut [u8]) {
    let n = from.len() / size;
    let whole = n * size;
    if whole > 0 {
        for (b, plane) in from[..whole].chunks_exact(n).enumerate() {
            to[b..].iter_mut().step_by(size).zip(plane).for_each(|(t, f)| *t = *f);
        }
    }
    to[whole..].copy_from_slice(&from[whole..]);
}

/// Undoes the bit shuffle: all first bits of the elements lie before all second ones, eight elements to a byte. Elements
/// beyond a multiple of eight are as they were.
pub(super) fn unbitshuffle(size: usize, from: &[u8], to: &mut [u8]) {
    let n = from.len() / size / 8 * 8;
    let (whole, row) = (n * size, n / 8);
    to[..whole].fill(0);
    for bit in 0..8 * size {
        let plane = &from[bit * row..(bit + 1) * row];
        for (i, byte) in plane.iter().enumerate() {
            for k in 0..8 {
                to[(8 * i + k) * size + bit / 8] |= (byte >> k & 1) << (bit % 8);
            }
        }
    }
    to[whole..].copy_from_slice(&from[whole..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_matches_of_blosclz() {
        let mut out = [0; 12];
        // Three literals, then nine bytes from three back.
        assert_eq!(blosclz(&[2, 1, 2, 3, 7 << 5, 0, 2], &mut out), Some(12));
        assert_eq!(out, [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]);
        let mut out = [0; 8];
        // A run of one byte.
        assert_eq!(blosclz(&[0, 9, 5 << 5, 0], &mut out), Some(8));
        assert_eq!(out, [9; 8]);
    }

    #[test]
    fn damage_is_no_panic() {
        let mut out = [0; 8];
        for packed in [&[][..], &[5], &[5, 1, 2], &[0, 1, 3 << 5, 1], &[0, 1, 7 << 5], &[0, 1, 7 << 5, 255], &[30, 0]] {
            assert_eq!(blosclz(packed, &mut out), None, "{packed:?}");
        }
        for codec in 0..8 {
            assert!(unpack(codec, &[255; 40], &mut out).is_err(), "{codec}");
        }
    }

    #[test]
    fn shuffles_are_undone() {
        let mut to = [0; 7];
        unshuffle(2, &[1, 3, 5, 2, 4, 6, 7], &mut to);
        assert_eq!(to, [1, 2, 3, 4, 5, 6, 7]);
        // An element larger than all there is: the bytes are as they were.
        let mut to = [0; 3];
        unshuffle(255, &[1, 2, 3], &mut to);
        assert_eq!(to, [1, 2, 3]);
        // Eight elements of two bytes, of which the k-th has bit k set, and one more.
        let elements: Vec<u8> = (0..8).flat_map(|k| (1u16 << (2 * k)).to_le_bytes()).chain([7, 8]).collect();
        let mut planes = vec![0; 18];
        for k in 0..8 {
            planes[2 * k] = 1 << k;
        }
        planes[16..].copy_from_slice(&[7, 8]);
        let mut to = vec![0; 18];
        unbitshuffle(2, &planes, &mut to);
        assert_eq!(to, elements);
    }
}

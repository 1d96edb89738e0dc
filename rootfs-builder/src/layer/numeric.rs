// SPDX-License-Identifier: Apache-2.0

//! Numbers in tar headers: octal text, or GNU's binary form for what does not fit in that.

/// The number in a header field: octal digits among spaces and NULs (nothing means 0), or, if the first
/// bit is set, a big-endian number in two's complement. `None` if it is neither or beyond 64 bits.
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => binary(field),
        Some(_) | None => octal(field),
    }
}

fn octal(field: &[u8]) -> Option<i64> {
    let start = field
        .iter()
        .position(|byte| !matches!(byte, b' ' | 0))
        .unwrap_or(field.len());
    let text = field.get(start..)?;
    let end = text
        .iter()
        .position(|byte| matches!(byte, b' ' | 0))
        .unwrap_or(text.len());
    let mut number = 0i64;
    for digit in text.get(..end)? {
        if !(b'0'..=b'7').contains(digit) {
            return None;
        }
        number = number
            .checked_mul(8)?
            .checked_add(i64::from(digit - b'0'))?;
    }
    Some(number)
}

fn binary(field: &[u8]) -> Option<i64> {
    // The marker is the first bit; the sign is the one after it.
    let (first, rest) = field.split_first()?;
    let negative = first & 0x40 != 0;
    let top = if negative {
        i64::from(first | 0x80) - 256
    } else {
        i64::from(first & 0x7f)
    };
    rest.iter().try_fold(top, |number, byte| {
        number.checked_mul(256)?.checked_add(i64::from(*byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_of_every_program_are_read() {
        for (field, number) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"77777777777", Some(0o77_777_777_777)),
            (b"0000648\0", None),
            (b"-000644\0", None),
            (b"0x644\0\0\0", None),
        ] {
            assert_eq!(numeric(field), number, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn binary_fields_are_read_up_to_64_bits() {
        let field = |tail: [u8; 8], head: [u8; 4]| [&head[..], &tail].concat();
        let positive = field(0x1_0000_0000u64.to_be_bytes(), [0x80, 0, 0, 0]);
        assert_eq!(numeric(&positive), Some(0x1_0000_0000));
        let negative = field((-5i64).to_be_bytes(), [0xff; 4]);
        assert_eq!(numeric(&negative), Some(-5));
        let most = field(i64::MAX.to_be_bytes(), [0x80, 0, 0, 0]);
        assert_eq!(numeric(&most), Some(i64::MAX));
        let beyond = field(u64::MAX.to_be_bytes(), [0x80, 0, 0, 0]);
        assert_eq!(numeric(&beyond), None);
        let far_beyond = field([0; 8], [0x80, 1, 0, 0]);
        assert_eq!(numeric(&far_beyond), None);
    }
}

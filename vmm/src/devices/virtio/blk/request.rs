// SPDX-License-Identifier: Apache-2.0

//! Block requests (virtio 1.2, 5.2.6), parsed from a copy of the guest's bytes.
//!
//! No I/O: a header, lengths and a payload go in; a [`Request`] whose every byte lies on the disk, or a status
//! for the guest, comes out.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR_LEN;

/// Length of a request's header, bytes.
pub(super) const HEADER_LEN: usize = 16;
/// Length of one range of DISCARD and WRITE_ZEROES, bytes.
const RANGE_LEN: usize = 16;
/// Most ranges of one request.
pub(super) const RANGES_MAX: u32 = 16;
/// Most sectors of one range: 64 MiB.
pub(super) const RANGE_SECTORS_MAX: u32 = 128 << 10;
/// Longest payload that is looked at, bytes.
pub(super) const PAYLOAD_MAX: usize = RANGE_LEN * RANGES_MAX as usize;
/// Most data of one request, bytes; below what one system call takes.
const DATA_MAX: u64 = 1 << 30;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Status {
    /// Done.
    #[error("done")]
    Ok,
    /// Failed, or was nonsense.
    #[error("failed")]
    IoError,
    /// Not an operation of this device.
    #[error("not supported")]
    Unsupported,
}

impl Status {
    /// The byte for the guest.
    pub(super) fn to_byte(self) -> u8 {
        let status = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        status.to_le_bytes()[0]
    }
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Size of the disk in sectors.
    pub(super) sectors: u64,
    /// Nothing may be written.
    pub(super) read_only: bool,
}

/// Bytes on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// First byte.
    pub(super) offset: u64,
    /// Number of bytes.
    pub(super) len: u64,
    /// Of WRITE_ZEROES: the space may be given back.
    pub(super) unmap: bool,
}

/// One request, within the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Read as many bytes as the chain has room for.
    Read { offset: u64 },
    /// Write as many bytes as the chain brings.
    Write { offset: u64 },
    /// Make writes durable.
    Flush,
    /// The serial number.
    GetId,
    /// Give space back.
    Discard(Vec<Range>),
    /// Write zeroes.
    WriteZeroes(Vec<Range>),
}

/// The guest's side of a request, copied once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    /// The header.
    pub(super) header: [u8; HEADER_LEN],
    /// Length of what the guest sends after it, bytes.
    pub(super) data_in_len: usize,
    /// The first [`PAYLOAD_MAX`] bytes of that.
    pub(super) payload: &'a [u8],
    /// Room before the status byte, bytes.
    pub(super) data_out_len: usize,
}

impl Request {
    /// Parses and checks a request.
    ///
    /// # Errors
    /// The status that ends it.
    pub(super) fn parse(parts: Parts<'_>, disk: Geometry) -> Result<Self, Status> {
        let [kind @ .., _, _, _, _] = parts.header.first_chunk::<8>().ok_or(Status::IoError)?;
        let sector = parts.header.last_chunk::<8>().ok_or(Status::IoError)?;
        let (kind, sector) = (u32::from_le_bytes(*kind), u64::from_le_bytes(*sector));
        match kind {
            VIRTIO_BLK_T_IN => Ok(Self::Read {
                offset: data_offset(sector, parts.data_out_len, disk)?,
            }),
            VIRTIO_BLK_T_OUT if disk.read_only => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => Ok(Self::Write {
                offset: data_offset(sector, parts.data_in_len, disk)?,
            }),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
                Err(Status::IoError)
            }
            VIRTIO_BLK_T_DISCARD => Ok(Self::Discard(ranges(parts, disk, 0)?)),
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Self::WriteZeroes(ranges(
                parts,
                disk,
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            )?)),
            _ => Err(Status::Unsupported),
        }
    }
}

/// Where the data of a READ or WRITE is, when all of it is on the disk.
fn data_offset(sector: u64, len: usize, disk: Geometry) -> Result<u64, Status> {
    let len = u64::try_from(len).map_err(|_| Status::IoError)?;
    if !len.is_multiple_of(SECTOR_LEN) || len > DATA_MAX {
        return Err(Status::IoError);
    }
    span(sector, len / SECTOR_LEN, disk).map(|(offset, _)| offset)
}

/// First byte and number of bytes of some sectors of the disk.
fn span(sector: u64, sectors: u64, disk: Geometry) -> Result<(u64, u64), Status> {
    let on_disk = sector
        .checked_add(sectors)
        .is_some_and(|end| end <= disk.sectors);
    if !on_disk {
        return Err(Status::IoError);
    }
    let bytes = |sectors: u64| sectors.checked_mul(SECTOR_LEN).ok_or(Status::IoError);
    Ok((bytes(sector)?, bytes(sectors)?))
}

fn ranges(parts: Parts<'_>, disk: Geometry, flags: u32) -> Result<Vec<Range>, Status> {
    let payload = parts.payload;
    if payload.len() != parts.data_in_len
        || payload.is_empty()
        || !payload.len().is_multiple_of(RANGE_LEN)
    {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::with_capacity(payload.len() / RANGE_LEN);
    let (chunks, _) = payload.as_chunks::<RANGE_LEN>();
    for &[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] in chunks {
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let sectors = u32::from_le_bytes([i, j, k, l]);
        let given = u32::from_le_bytes([m, n, o, p]);
        if given & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > RANGE_SECTORS_MAX {
            return Err(Status::IoError);
        }
        let (offset, len) = span(sector, u64::from(sectors), disk)?;
        ranges.push(Range {
            offset,
            len,
            unmap: given & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        });
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: Geometry = Geometry {
        sectors: 100,
        read_only: false,
    };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn parse(kind: u32, sector: u64, payload: &[u8], room: usize) -> Result<Request, Status> {
        let parts = Parts {
            header: header(kind, sector),
            data_in_len: payload.len(),
            payload,
            data_out_len: room,
        };
        Request::parse(parts, DISK)
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend_from_slice(&sectors.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes
    }

    #[test]
    fn data_ends_at_the_end_of_the_disk() {
        assert_eq!(
            parse(VIRTIO_BLK_T_IN, 99, &[], 512),
            Ok(Request::Read { offset: 99 * 512 })
        );
        assert_eq!(
            parse(VIRTIO_BLK_T_IN, 100, &[], 0),
            Ok(Request::Read { offset: 100 * 512 })
        );
        for (sector, room) in [
            (99, 1024),
            (100, 512),
            (101, 0),
            (u64::MAX, 512),
            (u64::MAX, 0),
            (u64::MAX / 512, 512),
            (0, 511),
            (0, 513),
            (0, 1),
            (0, 101 * 512),
            (0, usize::MAX),
        ] {
            assert_eq!(
                parse(VIRTIO_BLK_T_IN, sector, &[], room),
                Err(Status::IoError),
                "sector {sector}, {room} bytes"
            );
        }
        assert_eq!(
            parse(VIRTIO_BLK_T_OUT, 100, &[0; 512], 0),
            Err(Status::IoError)
        );
    }

    #[test]
    fn ranges_are_whole_and_on_the_disk() {
        let discard = |payload: &[u8]| parse(VIRTIO_BLK_T_DISCARD, 0, payload, 0);
        assert_eq!(
            discard(&range(90, 10, 0)),
            Ok(Request::Discard(vec![Range {
                offset: 90 * 512,
                len: 5120,
                unmap: false
            }]))
        );
        for bad in [
            range(90, 11, 0),
            range(u64::MAX, 1, 0),
            range(u64::MAX - 3, 4, 0),
            range(0, u32::MAX, 0),
            range(0, 1, 0)[..15].to_vec(),
            Vec::new(),
            [range(0, 1, 0), vec![0]].concat(),
        ] {
            assert_eq!(discard(&bad), Err(Status::IoError), "{bad:?}");
        }
        assert_eq!(discard(&range(0, 1, 1)), Err(Status::Unsupported));
        let zeroes = |flags| parse(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, flags), 0);
        assert!(matches!(zeroes(1), Ok(Request::WriteZeroes(ranges)) if ranges[0].unmap));
        assert_eq!(zeroes(2), Err(Status::Unsupported));
        // Longer than what was copied.
        let parts = Parts {
            header: header(VIRTIO_BLK_T_DISCARD, 0),
            data_in_len: PAYLOAD_MAX + RANGE_LEN,
            payload: &range(0, 1, 0).repeat(RANGES_MAX as usize),
            data_out_len: 0,
        };
        assert_eq!(Request::parse(parts, DISK), Err(Status::IoError));
    }

    #[test]
    fn a_read_only_disk_takes_no_writes() {
        for kind in [
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
        ] {
            let payload = range(0, 1, 0);
            let parts = Parts {
                header: header(kind, 0),
                data_in_len: payload.len(),
                payload: &payload,
                data_out_len: 0,
            };
            let disk = Geometry {
                read_only: true,
                ..DISK
            };
            assert_eq!(Request::parse(parts, disk), Err(Status::IoError));
        }
    }

    #[test]
    fn scsi_commands_and_unknown_ones_are_not_supported() {
        for kind in [2, 3, 14, 15, 0x8000_0000, u32::MAX] {
            assert_eq!(parse(kind, 0, &[], 512), Err(Status::Unsupported));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_on_the_disk(
            kind in prop_oneof![0u32..15, any::<u32>()],
            sector in prop_oneof![0u64..200, any::<u64>()],
            data_in in proptest::collection::vec(any::<u8>(), 0..PAYLOAD_MAX),
            data_out_len in prop_oneof![0usize..100_000, any::<usize>()],
            sectors in prop_oneof![1u64..200, any::<u64>()],
        ) {
            let disk = Geometry { sectors, read_only: false };
            let parts = Parts {
                header: header(kind, sector),
                data_in_len: data_in.len(),
                payload: &data_in,
                data_out_len,
            };
            let end = u128::from(sectors) * 512;
            match Request::parse(parts, disk) {
                Ok(Request::Read { offset }) => {
                    prop_assert!(u128::from(offset) + data_out_len as u128 <= end);
                }
                Ok(Request::Write { offset }) => {
                    prop_assert!(u128::from(offset) + data_in.len() as u128 <= end);
                }
                Ok(Request::Discard(ranges) | Request::WriteZeroes(ranges)) => {
                    for range in ranges {
                        prop_assert!(u128::from(range.offset) + u128::from(range.len) <= end);
                    }
                }
                Ok(Request::Flush | Request::GetId) | Err(_) => {}
            }
        }
    }
}

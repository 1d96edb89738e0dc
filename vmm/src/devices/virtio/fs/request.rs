// SPDX-License-Identifier: Apache-2.0

//! FUSE requests (include/uapi/linux/fuse.h, protocol 7.38), parsed from a copy of the guest's bytes.
//!
//! No I/O and no state: bytes go in, an [`Operation`] or an error comes out. What an operation holds is
//! checked as far as it can be without the file system: names are [`Name`]s, sizes are within bounds.

use virtiofsd::filesystem::{SetattrValid, SetxattrFlags};
use virtiofsd::fuse::{
    AccessIn, CopyfilerangeIn, CreateIn, FSYNC_FDATASYNC, FallocateIn, FlushIn, ForgetIn, FsyncIn,
    GETATTR_FH, GetattrIn, GetxattrIn, InHeader, InitInCompat, LinkIn, LseekIn, MkdirIn, MknodIn,
    OPEN_KILL_SUIDGID, Opcode, OpenIn, ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, WriteIn,
};
use virtiofsd::soft_idmap::GuestGid;

use super::body::Body;
use super::names::{Name, Target, XattrName};

/// Largest data of one READ or WRITE, bytes.
pub(super) const MAX_DATA: u32 = 1 << 20;
/// Largest request apart from the data of a WRITE, bytes: a SETXATTR of 64 KiB and what goes with it.
pub(super) const MAX_REQUEST: usize = 80 << 10;
/// Largest extended attribute and list of names, bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX).
pub(super) const XATTR_SIZE_MAX: u32 = 64 << 10;

/// A request that breaks the protocol or its bounds. Answered with [`RequestError::errno`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestError {
    /// Shorter than its operation needs.
    #[error("the request is shorter than its operation")]
    Short,
    /// Bytes that belong to nothing.
    #[error("the request is longer than its operation")]
    Long,
    /// Not one path component.
    #[error("the name is not one path component")]
    BadName,
    /// Longer than the file system allows.
    #[error("the name is too long")]
    NameTooLong,
    /// Longer than 255 bytes.
    #[error("the name of the extended attribute is too long")]
    XattrNameTooLong,
    /// An attribute that is the host's.
    #[error("the extended attribute is not for guests")]
    XattrRefused,
    /// A field outside its range.
    #[error("field {0} is out of range")]
    Range(&'static str),
    /// An operation that this server does not have.
    #[error("operation {0} is not supported")]
    Unsupported(u32),
}

impl RequestError {
    /// The error number for the guest.
    pub(super) fn errno(self) -> i32 {
        match self {
            Self::Short | Self::Long | Self::BadName | Self::Range(_) => libc::EINVAL,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::XattrNameTooLong => libc::ERANGE,
            Self::XattrRefused => libc::EOPNOTSUPP,
            Self::Unsupported(_) => libc::ENOSYS,
        }
    }
}

/// What INIT agreed on, as far as it changes how requests look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Dialect {
    /// FUSE_SETXATTR_EXT.
    pub(super) setxattr_ext: bool,
    /// FUSE_CREATE_SUPP_GROUP.
    pub(super) supplementary_groups: bool,
}

/// A new directory entry's name and the groups its maker is in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NewEntry<'a> {
    /// Its name.
    pub(super) name: Name<'a>,
    /// Supplementary groups, where the guest sent them.
    pub(super) groups: Vec<GuestGid>,
}

/// One operation. Node ids and handles are the guest's claims, for the file system to check.
#[derive(Debug)]
pub(super) enum Operation<'a> {
    Lookup(Name<'a>),
    Forget(u64),
    BatchForget(Vec<(u64, u64)>),
    Getattr(Option<u64>),
    Setattr {
        attr: Box<SetattrIn>,
        handle: Option<u64>,
        valid: SetattrValid,
    },
    Readlink,
    Symlink {
        entry: NewEntry<'a>,
        target: Target<'a>,
    },
    Mknod {
        entry: NewEntry<'a>,
        args: MknodIn,
    },
    Mkdir {
        entry: NewEntry<'a>,
        args: MkdirIn,
    },
    Unlink(Name<'a>),
    Rmdir(Name<'a>),
    Rename {
        from: Name<'a>,
        new_parent: u64,
        to: Name<'a>,
        flags: u32,
    },
    Link {
        node: u64,
        name: Name<'a>,
    },
    Open {
        flags: u32,
        kill_priv: bool,
    },
    Opendir(u32),
    Create {
        entry: NewEntry<'a>,
        args: CreateIn,
    },
    /// FUSE_TMPFILE: as CREATE, with a name that means nothing.
    Tmpfile {
        args: CreateIn,
        groups: Vec<GuestGid>,
    },
    Read(ReadIn),
    Write(WriteIn),
    Readdir(ReadIn),
    Readdirplus(ReadIn),
    Statfs,
    Release(ReleaseIn),
    Releasedir(ReleaseIn),
    Fsync {
        handle: u64,
        data_only: bool,
    },
    Setxattr {
        name: XattrName<'a>,
        value: &'a [u8],
        flags: u32,
        extra: SetxattrFlags,
    },
    Getxattr {
        name: XattrName<'a>,
        size: u32,
    },
    Listxattr(u32),
    Removexattr(XattrName<'a>),
    Flush(FlushIn),
    Init {
        args: InitInCompat,
        flags: u64,
    },
    Destroy,
    Access(u32),
    Interrupt,
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    CopyFileRange(CopyfilerangeIn),
    Syncfs,
}

/// Whether the guest waits for an answer to `opcode`.
pub(super) fn has_reply(opcode: u32) -> bool {
    !matches!(
        Opcode::try_from(opcode),
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt)
    )
}

impl<'a> Operation<'a> {
    /// Parses what follows `header`; of a WRITE without its data.
    ///
    /// # Errors
    /// On the first thing that is not as the protocol has it.
    pub(super) fn parse(
        header: &InHeader,
        body: &'a [u8],
        dialect: Dialect,
    ) -> Result<Self, RequestError> {
        let opcode = Opcode::try_from(header.opcode)
            .map_err(|()| RequestError::Unsupported(header.opcode))?;
        let mut body = Body(body);
        let operation = match opcode {
            Opcode::Lookup => Self::Lookup(body.last()?),
            Opcode::Unlink => Self::Unlink(body.last()?),
            Opcode::Rmdir => Self::Rmdir(body.last()?),
            Opcode::Removexattr => Self::Removexattr(body.last()?),
            Opcode::Forget => Self::Forget(body.take::<ForgetIn>()?.nlookup),
            Opcode::BatchForget => Self::BatchForget(body.forgets()?),
            Opcode::Getattr => {
                let GetattrIn { flags, fh, .. } = body.take()?;
                Self::Getattr((flags & GETATTR_FH != 0).then_some(fh))
            }
            Opcode::Setattr => body.setattr()?,
            Opcode::Symlink
            | Opcode::Mknod
            | Opcode::Mkdir
            | Opcode::Create
            | Opcode::Rename
            | Opcode::Rename2
            | Opcode::Link => Self::parse_entry(opcode, body, dialect)?,
            Opcode::Setxattr | Opcode::Getxattr | Opcode::Listxattr => {
                Self::parse_xattr(opcode, body, dialect)?
            }
            Opcode::Open => {
                let OpenIn { flags, open_flags } = body.take()?;
                Self::Open {
                    flags,
                    kill_priv: open_flags & OPEN_KILL_SUIDGID != 0,
                }
            }
            Opcode::Opendir => Self::Opendir(body.take::<OpenIn>()?.flags),
            Opcode::Read => Self::Read(body.data_range()?),
            Opcode::TmpFile => {
                let args = body.take()?;
                body.string()?;
                let groups = body.groups(dialect)?;
                Self::Tmpfile { args, groups }
            }
            Opcode::Readdir => Self::Readdir(body.take()?),
            Opcode::Readdirplus => Self::Readdirplus(body.take()?),
            Opcode::Write => {
                let write: WriteIn = body.take()?;
                if write.size > MAX_DATA {
                    return Err(RequestError::Range("size"));
                }
                Self::Write(write)
            }
            Opcode::Release => Self::Release(body.take()?),
            Opcode::Releasedir => Self::Releasedir(body.take()?),
            Opcode::Fsync | Opcode::Fsyncdir => {
                let FsyncIn {
                    fh, fsync_flags, ..
                } = body.take()?;
                Self::Fsync {
                    handle: fh,
                    data_only: fsync_flags & FSYNC_FDATASYNC != 0,
                }
            }
            Opcode::Flush => Self::Flush(body.take()?),
            Opcode::Init => body.init()?,
            Opcode::Access => Self::Access(body.take::<AccessIn>()?.mask),
            Opcode::Fallocate => Self::Fallocate(body.take()?),
            Opcode::Lseek => Self::Lseek(body.take()?),
            Opcode::CopyFileRange => Self::CopyFileRange(body.take()?),
            Opcode::Readlink => Self::Readlink,
            Opcode::Statfs => Self::Statfs,
            Opcode::Syncfs => Self::Syncfs,
            Opcode::Destroy => Self::Destroy,
            Opcode::Interrupt => Self::Interrupt,
            // Locks stay inside the guest (FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS are not agreed on), and DAX is
            // not offered.
            Opcode::Getlk
            | Opcode::Setlk
            | Opcode::Setlkw
            | Opcode::Bmap
            | Opcode::Ioctl
            | Opcode::Poll
            | Opcode::NotifyReply
            | Opcode::SetupMapping
            | Opcode::RemoveMapping => return Err(RequestError::Unsupported(header.opcode)),
        };
        Ok(operation)
    }

    /// Operations on directory entries.
    fn parse_entry(
        opcode: Opcode,
        mut body: Body<'a>,
        dialect: Dialect,
    ) -> Result<Self, RequestError> {
        Ok(match opcode {
            Opcode::Mknod => Self::Mknod {
                args: body.take()?,
                entry: body.new_entry(dialect)?,
            },
            Opcode::Mkdir => Self::Mkdir {
                args: body.take()?,
                entry: body.new_entry(dialect)?,
            },
            Opcode::Create => Self::Create {
                args: body.take()?,
                entry: body.new_entry(dialect)?,
            },
            Opcode::Symlink => {
                let name = body.string()?.try_into()?;
                let target = body.string()?.try_into()?;
                let groups = body.groups(dialect)?;
                Self::Symlink {
                    entry: NewEntry { name, groups },
                    target,
                }
            }
            Opcode::Link => Self::Link {
                node: body.take::<LinkIn>()?.oldnodeid,
                name: body.last()?,
            },
            Opcode::Rename => {
                let RenameIn { newdir } = body.take()?;
                body.rename(newdir, 0)?
            }
            Opcode::Rename2 => {
                let Rename2In { newdir, flags, .. } = body.take()?;
                body.rename(newdir, flags)?
            }
            other => return Err(RequestError::Unsupported(other as u32)),
        })
    }

    /// Extended attributes.
    fn parse_xattr(
        opcode: Opcode,
        mut body: Body<'a>,
        dialect: Dialect,
    ) -> Result<Self, RequestError> {
        if let Opcode::Setxattr = opcode {
            return body.setxattr(dialect);
        }
        // The host takes a larger size for the largest there is, so does the server.
        let size = body.take::<GetxattrIn>()?.size.min(XATTR_SIZE_MAX);
        Ok(match opcode {
            Opcode::Getxattr => Self::Getxattr {
                name: body.last()?,
                size,
            },
            _ => Self::Listxattr(size),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtiofsd::fuse::{BatchForgetIn, SetxattrIn};
    use vm_memory::ByteValued;

    /// FUSE_EXT_GROUPS.
    const EXT_GROUPS: u32 = 32;

    fn header(opcode: Opcode) -> InHeader {
        InHeader {
            opcode: opcode as u32,
            ..Default::default()
        }
    }

    fn parse(opcode: Opcode, body: &[u8], dialect: Dialect) -> Result<Operation<'_>, RequestError> {
        Operation::parse(&header(opcode), body, dialect)
    }

    const GROUPS: Dialect = Dialect {
        setxattr_ext: true,
        supplementary_groups: true,
    };

    fn groups_body(size: u32, kind: u32, count: u32, groups: &[u32]) -> Vec<u8> {
        let mut body = MkdirIn::default().as_slice().to_vec();
        body.extend_from_slice(b"name\0");
        for word in [size, kind, count].iter().chain(groups) {
            body.extend_from_slice(&word.to_le_bytes());
        }
        body
    }

    #[test]
    fn a_name_must_end_and_be_the_last() {
        let none = Dialect::default();
        assert!(matches!(
            parse(Opcode::Lookup, b"a\0", none),
            Ok(Operation::Lookup(_))
        ));
        for (body, error) in [
            (&b"a"[..], RequestError::Short),
            (b"", RequestError::Short),
            (b"a\0b", RequestError::Long),
            (b"..\0", RequestError::BadName),
            (b"\0", RequestError::BadName),
        ] {
            assert_eq!(parse(Opcode::Lookup, body, none).unwrap_err(), error);
        }
    }

    #[test]
    fn both_names_of_a_rename_are_checked() {
        let mut body = Rename2In::default().as_slice().to_vec();
        body.extend_from_slice(b"a\0../b\0");
        assert_eq!(
            parse(Opcode::Rename2, &body, GROUPS).unwrap_err(),
            RequestError::BadName
        );
        let mut body = Rename2In {
            flags: 8,
            ..Default::default()
        }
        .as_slice()
        .to_vec();
        body.extend_from_slice(b"a\0b\0");
        assert_eq!(
            parse(Opcode::Rename2, &body, GROUPS).unwrap_err(),
            RequestError::Range("flags")
        );
    }

    #[test]
    fn groups_are_taken_where_agreed_on_and_whole() {
        let good = groups_body(20, EXT_GROUPS, 2, &[7, 9]);
        match parse(Opcode::Mkdir, &good, GROUPS).unwrap() {
            Operation::Mkdir { entry, .. } => {
                assert_eq!(entry.groups, [GuestGid::from(7), GuestGid::from(9)]);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(
            parse(Opcode::Mkdir, &good, Dialect::default()).unwrap_err(),
            RequestError::Long
        );
        for bad in [
            groups_body(20, EXT_GROUPS, 3, &[7, 9]),
            groups_body(20, EXT_GROUPS, u32::MAX, &[7, 9]),
            groups_body(4, EXT_GROUPS, 2, &[7, 9]),
            groups_body(24, EXT_GROUPS, 2, &[7, 9]),
            groups_body(20, 1, 2, &[7, 9]),
            groups_body(28, EXT_GROUPS, 1, &[7, 9, 11]),
        ] {
            assert!(parse(Opcode::Mkdir, &bad, GROUPS).is_err());
        }
    }

    #[test]
    fn the_size_of_an_xattr_is_that_of_its_value() {
        let body = |size: u32| {
            let mut body = SetxattrIn {
                size,
                ..Default::default()
            }
            .as_slice()
            .to_vec();
            body.extend_from_slice(b"user.a\0value");
            body
        };
        assert!(parse(Opcode::Setxattr, &body(5), GROUPS).is_ok());
        for size in [0, 4, 6, u32::MAX] {
            assert_eq!(
                parse(Opcode::Setxattr, &body(size), GROUPS).unwrap_err(),
                RequestError::Range("size")
            );
        }
    }

    #[test]
    fn a_forget_list_cannot_claim_more_than_it_holds() {
        let mut body = BatchForgetIn {
            count: u32::MAX,
            dummy: 0,
        }
        .as_slice()
        .to_vec();
        body.extend_from_slice(&[0; 32]);
        assert_eq!(
            parse(Opcode::BatchForget, &body, GROUPS).unwrap_err(),
            RequestError::Short
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(
            opcode in 0u32..60,
            body in proptest::collection::vec(any::<u8>(), 0..200),
            setxattr_ext: bool,
            supplementary_groups: bool,
        ) {
            let header = InHeader { opcode, ..Default::default() };
            let dialect = Dialect { setxattr_ext, supplementary_groups };
            match Operation::parse(&header, &body, dialect) {
                Ok(Operation::Read(read)) => prop_assert!(read.size <= MAX_DATA),
                Ok(Operation::Write(write)) => prop_assert!(write.size <= MAX_DATA),
                Ok(Operation::Lookup(name) | Operation::Unlink(name)) => {
                    prop_assert!(!name.as_c_str().to_bytes().contains(&b'/'));
                }
                Ok(_) => {}
                Err(error) => prop_assert!(error.errno() > 0),
            }
        }

        #[test]
        fn every_prefix_of_a_request_is_refused(cut in 0usize..22) {
            let mut body = CreateIn::default().as_slice().to_vec();
            body.extend_from_slice(b"name\0");
            prop_assume!(cut < body.len());
            let header = header(Opcode::Create);
            prop_assert!(Operation::parse(&header, &body[..cut], GROUPS).is_err());
        }
    }
}

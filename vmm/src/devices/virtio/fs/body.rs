// SPDX-License-Identifier: Apache-2.0

//! The pieces that FUSE requests are made of, taken off the front of a request one by one.

use std::ffi::CStr;

use virtiofsd::filesystem::{SetattrValid, SetxattrFlags};
use virtiofsd::fuse::{
    BatchForgetIn, ExtHeader, FATTR_FH, ForgetOne, InitInCompat, InitInExt, ReadIn, SetattrIn,
    SetxattrIn, SetxattrInCompat, SuppGroups,
};
use virtiofsd::soft_idmap::GuestGid;
use vm_memory::ByteValued;

use super::request::{Dialect, MAX_DATA, NewEntry, Operation, RequestError, XATTR_SIZE_MAX};

/// Most supplementary groups (NGROUPS_MAX).
const GROUPS_MAX: u32 = 65536;
/// FUSE_EXT_GROUPS.
const EXT_GROUPS: u32 = 32;

/// What is left of a request.
pub(super) struct Body<'a>(pub(super) &'a [u8]);

impl<'a> Body<'a> {
    /// The next fixed structure.
    pub(super) fn take<T: ByteValued + Default>(&mut self) -> Result<T, RequestError> {
        let mut value = T::default();
        let (bytes, rest) = self
            .0
            .split_at_checked(size_of::<T>())
            .ok_or(RequestError::Short)?;
        value.as_mut_slice().copy_from_slice(bytes);
        self.0 = rest;
        Ok(value)
    }

    /// The next NUL-terminated string.
    pub(super) fn string(&mut self) -> Result<&'a CStr, RequestError> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| RequestError::Short)?;
        self.0 = self
            .0
            .get(string.count_bytes() + 1..)
            .ok_or(RequestError::Short)?;
        Ok(string)
    }

    /// A string with nothing after it.
    pub(super) fn last<T: TryFrom<&'a CStr, Error = RequestError>>(
        &mut self,
    ) -> Result<T, RequestError> {
        let string = self.string()?;
        self.end()?;
        string.try_into()
    }

    fn end(&self) -> Result<(), RequestError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(RequestError::Long)
        }
    }

    pub(super) fn new_entry(&mut self, dialect: Dialect) -> Result<NewEntry<'a>, RequestError> {
        Ok(NewEntry {
            name: self.string()?.try_into()?,
            groups: self.groups(dialect)?,
        })
    }

    /// The extensions after a name: at most one list of groups (struct fuse_supp_groups), padded to 8 bytes.
    pub(super) fn groups(&mut self, dialect: Dialect) -> Result<Vec<GuestGid>, RequestError> {
        if self.0.is_empty() || !dialect.supplementary_groups {
            self.end()?;
            return Ok(Vec::new());
        }
        let header: ExtHeader = self.take()?;
        if header.ext_type != EXT_GROUPS {
            return Err(RequestError::Range("extension type"));
        }
        let size = (header.size as usize)
            .checked_sub(size_of::<ExtHeader>())
            .ok_or(RequestError::Range("extension size"))?;
        if size != self.0.len() {
            return Err(RequestError::Range("extension size"));
        }
        let SuppGroups { nr_groups } = self.take()?;
        if nr_groups > GROUPS_MAX {
            return Err(RequestError::Range("number of groups"));
        }
        let groups = (0..nr_groups)
            .map(|_| self.take::<u32>().map(GuestGid::from))
            .collect::<Result<_, _>>()?;
        // Padding to eight bytes.
        if self.0.len() >= 8 {
            return Err(RequestError::Long);
        }
        self.0 = &[];
        Ok(groups)
    }

    pub(super) fn forgets(&mut self) -> Result<Vec<(u64, u64)>, RequestError> {
        let BatchForgetIn { count, .. } = self.take()?;
        if self.0.len() / size_of::<ForgetOne>() < count as usize {
            return Err(RequestError::Short);
        }
        (0..count)
            .map(|_| {
                let ForgetOne { nodeid, nlookup } = self.take()?;
                Ok((nodeid, nlookup))
            })
            .collect()
    }

    pub(super) fn setattr(&mut self) -> Result<Operation<'a>, RequestError> {
        let attr: SetattrIn = self.take()?;
        if i64::try_from(attr.size).is_err() {
            return Err(RequestError::Range("size"));
        }
        Ok(Operation::Setattr {
            handle: (attr.valid & FATTR_FH != 0).then_some(attr.fh),
            valid: SetattrValid::from_bits_truncate(attr.valid),
            attr: Box::new(attr),
        })
    }

    pub(super) fn rename(
        &mut self,
        new_parent: u64,
        flags: u32,
    ) -> Result<Operation<'a>, RequestError> {
        const KNOWN: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
        if flags & !KNOWN != 0 {
            return Err(RequestError::Range("flags"));
        }
        Ok(Operation::Rename {
            from: self.string()?.try_into()?,
            new_parent,
            to: self.last()?,
            flags,
        })
    }

    pub(super) fn data_range(&mut self) -> Result<ReadIn, RequestError> {
        let read: ReadIn = self.take()?;
        if read.size > MAX_DATA {
            return Err(RequestError::Range("size"));
        }
        Ok(read)
    }

    pub(super) fn setxattr(&mut self, dialect: Dialect) -> Result<Operation<'a>, RequestError> {
        let args = if dialect.setxattr_ext {
            self.take()?
        } else {
            let SetxattrInCompat { size, flags } = self.take()?;
            SetxattrIn {
                size,
                flags,
                ..Default::default()
            }
        };
        let name = self.string()?.try_into()?;
        if args.size > XATTR_SIZE_MAX || args.size as usize != self.0.len() {
            return Err(RequestError::Range("size"));
        }
        Ok(Operation::Setxattr {
            name,
            value: self.0,
            flags: args.flags,
            extra: SetxattrFlags::from_bits_truncate(args.setxattr_flags),
        })
    }

    pub(super) fn init(&mut self) -> Result<Operation<'a>, RequestError> {
        /// FUSE_INIT_EXT: the second half of the flags follows.
        const INIT_EXT: u32 = 1 << 30;
        let args: InitInCompat = self.take()?;
        let mut flags = u64::from(args.flags);
        if args.flags & INIT_EXT != 0 {
            flags |= u64::from(self.take::<InitInExt>()?.flags2) << 32;
        }
        Ok(Operation::Init { args, flags })
    }
}

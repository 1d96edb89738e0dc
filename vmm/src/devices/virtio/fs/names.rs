// SPDX-License-Identifier: Apache-2.0

//! Which names a guest may say.
//!
//! The passthrough file system hands names to mkdirat(2), unlinkat(2), renameat2(2) and their like as they
//! come, so `..`, an absolute path or a path through a symbolic link would leave the served directory
//! (GHSA-2gv2-cffp-j227 was such a FUSE_SYMLINK). So one name is one component here, by type.

use std::ffi::CStr;

use super::request::RequestError;

/// Longest name, bytes without the NUL (NAME_MAX).
const NAME_MAX: usize = 255;
/// Longest extended attribute name, bytes without the NUL (XATTR_NAME_MAX).
const XATTR_NAME_MAX: usize = 255;
/// Longest target of a symbolic link, bytes without the NUL (PATH_MAX with it).
const TARGET_MAX: usize = 4095;

/// One component of a path: not empty, no `/`, not `.` or `..`, at most 255 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// The name for a system call.
    pub(super) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

impl<'a> TryFrom<&'a CStr> for Name<'a> {
    type Error = RequestError;

    fn try_from(name: &'a CStr) -> Result<Self, RequestError> {
        let bytes = name.to_bytes();
        if bytes.len() > NAME_MAX {
            return Err(RequestError::NameTooLong);
        }
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(RequestError::BadName);
        }
        Ok(Self(name))
    }
}

/// What a symbolic link points to. Any path: the host never follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target<'a>(pub(super) &'a CStr);

impl<'a> TryFrom<&'a CStr> for Target<'a> {
    type Error = RequestError;

    fn try_from(target: &'a CStr) -> Result<Self, RequestError> {
        match target.to_bytes().len() {
            0 => Err(RequestError::BadName),
            1..=TARGET_MAX => Ok(Self(target)),
            _ => Err(RequestError::NameTooLong),
        }
    }
}

/// Name of an extended attribute that the guest may use on the host: `user.*`, `trusted.*`,
/// `security.capability` and the two POSIX ACLs. Labels of the host's security modules (`security.selinux`,
/// `.ima`, `.evm`, …) are the host's alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct XattrName<'a>(&'a CStr);

impl<'a> XattrName<'a> {
    /// The name for a system call.
    pub(super) fn as_c_str(self) -> &'a CStr {
        self.0
    }

    /// Whether the guest may see and set an attribute called `name` (without NUL).
    pub(super) fn is_allowed(name: &[u8]) -> bool {
        matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        ) || name
            .strip_prefix(b"user.")
            .is_some_and(|rest| !rest.is_empty())
            || name
                .strip_prefix(b"trusted.")
                .is_some_and(|rest| !rest.is_empty())
    }
}

impl<'a> TryFrom<&'a CStr> for XattrName<'a> {
    type Error = RequestError;

    fn try_from(name: &'a CStr) -> Result<Self, RequestError> {
        let bytes = name.to_bytes();
        if bytes.len() > XATTR_NAME_MAX {
            return Err(RequestError::XattrNameTooLong);
        }
        if !Self::is_allowed(bytes) {
            return Err(RequestError::XattrRefused);
        }
        Ok(Self(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        for good in [c"a", c"...", c".a", c"a.", c" ", c"\xff", c"-rf", c"a\\b"] {
            assert!(Name::try_from(good).is_ok(), "{good:?}");
        }
        for bad in [
            c"", c".", c"..", c"/", c"/etc", c"a/b", c"../x", c"a/..", c"x/",
        ] {
            assert_eq!(
                Name::try_from(bad),
                Err(RequestError::BadName),
                "{bad:?} must be refused"
            );
        }
    }

    #[test]
    fn a_name_has_at_most_255_bytes() {
        let fits = std::ffi::CString::new(vec![b'n'; 255]).unwrap();
        let over = std::ffi::CString::new(vec![b'n'; 256]).unwrap();
        assert!(Name::try_from(fits.as_c_str()).is_ok());
        assert_eq!(
            Name::try_from(over.as_c_str()),
            Err(RequestError::NameTooLong)
        );
    }

    #[test]
    fn the_hosts_own_labels_are_out_of_reach() {
        for good in [
            c"user.x",
            c"trusted.overlay.opaque",
            c"security.capability",
            c"system.posix_acl_access",
        ] {
            assert!(XattrName::try_from(good).is_ok(), "{good:?}");
        }
        for bad in [
            c"",
            c"user.",
            c"user",
            c"security.selinux",
            c"security.ima",
            c"security.capabilityx",
            c"system.nfs4_acl",
            c"btrfs.compression",
        ] {
            assert!(XattrName::try_from(bad).is_err(), "{bad:?}");
        }
    }
}

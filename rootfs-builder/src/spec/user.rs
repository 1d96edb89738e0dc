// SPDX-License-Identifier: Apache-2.0

//! Who the process runs as: `USER[:GROUP]` of an image (or of a person), by the root's own
//! `/etc/passwd` and `/etc/group`.
//!
//! The rules are those of the image specification: names or numbers on both sides; without a group, the
//! user's own group and all groups that list the user; with one, that one alone. A number needs no
//! entry. The files are the image's, so they are read inside its tree and only up to a size.

use std::io::{self, Read as _};

use crate::confined::ConfinedRoot;

/// Largest `/etc/passwd` or `/etc/group` read, in bytes.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Most supplementary groups (`NGROUPS_MAX` of Linux).
const MAX_GROUPS: usize = 65_536;

/// Why a user could not be found out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserError {
    /// One of the two files could not be read.
    #[error("failed to read /{name} of the root file system")]
    Read {
        /// The file.
        name: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// One of the two files is too large.
    #[error("/{0} of the root file system is larger than {MAX_FILE_BYTES} bytes")]
    TooLarge(&'static str),
    /// There is no such user.
    #[error("there is no user {0:?} in /etc/passwd of the root file system")]
    NoUser(String),
    /// There is no such group.
    #[error("there is no group {0:?} in /etc/group of the root file system")]
    NoGroup(String),
    /// The user is in more groups than Linux can represent.
    #[error("the user {0:?} is in more than {MAX_GROUPS} groups")]
    TooManyGroups(String),
}

/// A user as the kernel knows one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvedUser {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups, each once, in order.
    pub additional_gids: Vec<u32>,
}

/// A line of `/etc/passwd`.
struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

/// A line of `/etc/group`.
struct GroupLine<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Finds out who `user` (`USER[:GROUP]`; empty means root) is in the tree below `root`.
///
/// # Errors
/// Any [`UserError`].
pub(crate) fn resolve(user: &str, root: &ConfinedRoot) -> Result<ResolvedUser, UserError> {
    let passwd = read_text(root, "etc/passwd")?;
    let group = read_text(root, "etc/group")?;
    resolve_in(user, &passwd, &group)
}

fn resolve_in(user: &str, passwd: &str, group: &str) -> Result<ResolvedUser, UserError> {
    let (user_part, group_part) = match user.split_once(':') {
        Some((user, group)) => (user, group),
        None => (user, ""),
    };
    let user_part = if user_part.is_empty() { "0" } else { user_part };
    let line = passwd_lines(passwd)
        .find(|line| line.name == user_part || number(user_part) == Some(line.uid));
    let (uid, own_gid) = match (&line, number(user_part)) {
        (Some(line), _) => (line.uid, line.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(UserError::NoUser(user_part.to_owned())),
    };
    if group_part.is_empty() {
        let additional_gids = match &line {
            Some(line) => groups_with(group, line.name)?,
            None => Vec::new(),
        };
        return Ok(ResolvedUser {
            uid,
            gid: own_gid,
            additional_gids,
        });
    }
    let named = group_lines(group)
        .find(|line| line.name == group_part || number(group_part) == Some(line.gid));
    let gid = match (named, number(group_part)) {
        (Some(line), _) => line.gid,
        (None, Some(gid)) => gid,
        (None, None) => return Err(UserError::NoGroup(group_part.to_owned())),
    };
    Ok(ResolvedUser {
        uid,
        gid,
        additional_gids: Vec::new(),
    })
}

fn groups_with(group: &str, user: &str) -> Result<Vec<u32>, UserError> {
    let mut gids: Vec<u32> = group_lines(group)
        .filter(|line| line.members.split(',').any(|member| member.trim() == user))
        .map(|line| line.gid)
        .collect();
    gids.sort_unstable();
    gids.dedup();
    if gids.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups(user.to_owned()));
    }
    Ok(gids)
}

/// A user or group number; the last one of 32 bits means "none" to the kernel.
fn number(text: &str) -> Option<u32> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|number| *number != u32::MAX)
}

/// The lines that can be read; others are passed over, as every program does.
fn passwd_lines(text: &str) -> impl Iterator<Item = PasswdLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?)?;
        let gid = number(fields.next()?)?;
        Some(PasswdLine { name, uid, gid })
    })
}

fn group_lines(text: &str) -> impl Iterator<Item = GroupLine<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        Some(GroupLine {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

/// A file of the tree as text; none at all is as good as an empty one.
fn read_text(root: &ConfinedRoot, name: &'static str) -> Result<String, UserError> {
    let read_error = |source| UserError::Read { name, source };
    let parts: Vec<&[u8]> = name.as_bytes().split(|byte| *byte == b'/').collect();
    let file = match root.open_file(&parts) {
        Ok(file) => file,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(String::new());
        }
        Err(error) => return Err(read_error(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(read_error)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(UserError::TooLarge(name));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        broken:x:nine:9::/:\n\n# comment\n\
        www:x:33:34:www:/var/www:/bin/false\n\
        1000:x:77:78::/:\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:syslog,www\nwww:x:34:\ncdrom:x:24: www ,other\n\
        again:x:4:www\nnot:x:5:wwwx\n";

    fn who(user: &str) -> Result<(u32, u32, Vec<u32>), UserError> {
        let user = resolve_in(user, PASSWD, GROUP)?;
        Ok((user.uid, user.gid, user.additional_gids))
    }

    #[test]
    fn names_and_numbers_follow_the_image_specification() {
        assert_eq!(who("").unwrap(), (0, 0, vec![]));
        assert_eq!(who("root").unwrap(), (0, 0, vec![]));
        assert_eq!(who("www").unwrap(), (33, 34, vec![4, 24]));
        assert_eq!(who("33").unwrap(), (33, 34, vec![4, 24]));
        assert_eq!(who("www:adm").unwrap(), (33, 4, vec![]));
        assert_eq!(who("www:4").unwrap(), (33, 4, vec![]));
        assert_eq!(who("4711").unwrap(), (4711, 0, vec![]));
        assert_eq!(who("4711:4712").unwrap(), (4711, 4712, vec![]));
        assert_eq!(who(":adm").unwrap(), (0, 4, vec![]));
        // A name of digits is a name first.
        assert_eq!(who("1000").unwrap(), (77, 78, vec![]));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_refused() {
        for user in [
            "nobody",
            "broken",
            "-1",
            "4294967295",
            "99999999999",
            "+5",
            "www ",
        ] {
            assert!(matches!(who(user), Err(UserError::NoUser(_))), "{user}");
        }
        for user in ["www:nothing", "0:4294967295"] {
            assert!(matches!(who(user), Err(UserError::NoGroup(_))), "{user}");
        }
    }

    #[test]
    fn passwd_is_read_inside_the_tree_only() {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(place.path().join("root/etc")).unwrap();
        std::fs::write(place.path().join("passwd"), "host:x:7:7::/:\n").unwrap();
        symlink(
            place.path().join("passwd"),
            place.path().join("root/etc/passwd"),
        )
        .unwrap();
        let root = ConfinedRoot::open(&place.path().join("root")).unwrap();
        assert!(matches!(resolve("host", &root), Err(UserError::NoUser(_))));
        assert_eq!(resolve("5", &root).unwrap().uid, 5);
    }
}

// SPDX-License-Identifier: Apache-2.0

//! OCI spec → [`Plan`]: host paths become guest paths, and the VM gets its size. Pure: what it must know of the host
//! comes in by [`HostFacts`].
//!
//! | in config.json | becomes |
//! |---|---|
//! | `root.path` | a detached host mount, in the guest `<shared>/<id>/rootfs`; read-only on the host, too, once the guest has made its mount points |
//! | bind mounts | detached host mounts `<shared>/<id>/m<N>`, read-only enforced by the host; options stay for the guest's own bind |
//! | a bind on /dev/shm | a tmpfs of the same size: shared memory belongs into the guest |
//! | binds of the host's /proc, /sys, /sys/fs/cgroup on themselves | the guest's own proc, sysfs, cgroup |
//! | proc, sysfs, tmpfs, mqueue, devpts, cgroup mounts | as they are, made in the guest |
//! | namespaces | mount, pid, ipc and uts always own; network dropped: the guest's network is the pod's |
//! | resources | as they are, for the guest's cgroups, but for CPU sets and device numbers of the host |
//! | memory limit, CPU quota | also the VM's size, if that is more than configured |
//! | AppArmor profile, SELinux labels | dropped with a warning: the guest's kernel has neither |
//! | cgroupsPath | the pod's cgroup on the host; in the guest `/<id>` |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use caisson_protocol::PROTOCOL_VERSION;
use caisson_protocol::boot::{BootParams, GUEST_SHARED_DIR, LogLevel};
use caisson_protocol::vm::MAX_VCPUS;
use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process, Root,
};

use super::load::Bundle;
use super::plan::{Plan, SandboxPlan, VmShape};
use super::validate::{is_bind, source_of};
use crate::config::{AgentLog, Config};
use crate::resources::cgroup::{CgroupError, path_from_spec};
use crate::resources::volume::MountPlan;
use crate::sandbox::id::ContainerId;

/// Name of the root file system in the container's shared directory.
pub const ROOTFS_NAME: &str = "rootfs";
/// Most mounts of one container.
const MAX_MOUNTS: usize = 4096;
const MIB: u64 = 1 << 20;

/// Why a valid spec cannot be translated.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
    /// A path of the host's kernel interfaces, which a guest must not see.
    #[error("mount of the host's {source_path} on {destination} is not supported")]
    HostKernel {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
    },
    /// More mounts than [`MAX_MOUNTS`].
    #[error("{0} mounts are more than {MAX_MOUNTS}")]
    TooManyMounts(usize),
    /// The guest would be larger than the host.
    #[error("the VM needs {needed_mib} MiB of memory, this host has {host_mib} MiB")]
    TooMuchMemory {
        /// Of the guest.
        needed_mib: u64,
        /// Of the host.
        host_mib: u64,
    },
    /// A bad `linux.cgroupsPath`.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// What translation has to know about the host.
pub struct HostFacts<'a> {
    /// Its memory, MiB.
    pub memory_mib: u64,
    /// Size in bytes of the file system that a path is on.
    pub file_system_size: &'a dyn Fn(&Path) -> Option<u64>,
}

impl std::fmt::Debug for HostFacts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFacts")
            .field("memory_mib", &self.memory_mib)
            .finish_non_exhaustive()
    }
}

/// A plan, and what had to be left out of it.
#[derive(Debug)]
pub struct Translation {
    /// What is to be made.
    pub plan: Plan,
    /// For the log.
    pub warnings: Vec<String>,
}

/// Translates a bundle that [`super::validate::validate`] accepted.
///
/// # Errors
/// When a mount, the size or the cgroup cannot be had.
pub fn translate(
    id: &ContainerId,
    bundle: &Bundle,
    config: &Config,
    host: &HostFacts<'_>,
) -> Result<Translation, TranslateError> {
    let mut warnings = Vec::new();
    let mut spec = bundle.spec.clone();
    let mut shm_size_bytes = 0;

    let mut linux = spec.linux().clone().unwrap_or_default();
    let sysctls = take_network_sysctls(&mut linux);
    let cgroup = path_from_spec(linux.cgroups_path().as_deref(), id.as_str())?;
    let vm = shape(config, linux.resources().as_ref(), host)?;

    let mut plans = vec![rootfs_plan(id, bundle)];
    let originals = spec.mounts().clone().unwrap_or_default();
    if originals.len() > MAX_MOUNTS {
        return Err(TranslateError::TooManyMounts(originals.len()));
    }
    let mut mounts = Vec::with_capacity(originals.len());
    for (index, mount) in originals.into_iter().enumerate() {
        let (guest, plan) = guest_mount(id, bundle, index, mount, host)?;
        if guest.destination() == Path::new("/dev/shm") {
            shm_size_bytes = tmpfs_size(&guest).unwrap_or(shm_size_bytes);
        }
        mounts.push(guest);
        plans.extend(plan);
    }

    let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
    let hostname = hostname.unwrap_or_else(|| id.as_str().chars().take(64).collect());
    spec.set_mounts(Some(mounts));
    spec.set_root(spec.root().clone().map(|root| guest_root(root, id)));
    spec.set_process(
        spec.process()
            .clone()
            .map(|p| guest_process(p, &mut warnings)),
    );
    spec.set_linux(Some(guest_linux(linux, id, &mut warnings)));
    let plan = Plan {
        vmm: config.vm.vmm.clone(),
        vm,
        sandbox: SandboxPlan {
            hostname,
            shm_size_bytes,
            sysctls,
        },
        mounts: plans,
        guest_spec: spec,
        timeouts: config.timeouts.clone(),
        cgroup,
    };
    Ok(Translation { plan, warnings })
}

/// The process of a container or an exec as the guest gets it.
pub fn guest_process(mut process: Process, warnings: &mut Vec<String>) -> Process {
    if process
        .apparmor_profile()
        .as_deref()
        .is_some_and(|p| !p.is_empty())
    {
        warnings.push("process.apparmorProfile is ignored: the guest has no AppArmor".to_owned());
    }
    if process
        .selinux_label()
        .as_deref()
        .is_some_and(|l| !l.is_empty())
    {
        warnings.push("process.selinuxLabel is ignored: the guest has no SELinux".to_owned());
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    process
}

fn shape(
    config: &Config,
    resources: Option<&LinuxResources>,
    host: &HostFacts<'_>,
) -> Result<VmShape, TranslateError> {
    let vm = &config.vm;
    let memory_mib = memory_mib(config, resources);
    if memory_mib > host.memory_mib {
        return Err(TranslateError::TooMuchMemory {
            needed_mib: memory_mib,
            host_mib: host.memory_mib,
        });
    }
    let params = BootParams {
        protocol_version: PROTOCOL_VERSION,
        log: match config.log.agent {
            AgentLog::Error => LogLevel::Error,
            AgentLog::Warn => LogLevel::Warn,
            AgentLog::Debug => LogLevel::Debug,
        },
    };
    let mut cmdline = params.to_cmdline();
    if !vm.kernel_params.trim().is_empty() {
        cmdline.push(' ');
        cmdline.push_str(vm.kernel_params.trim());
    }
    Ok(VmShape {
        kernel: vm.kernel.clone(),
        initramfs: vm.initramfs.clone(),
        cmdline,
        vcpus: vcpus(vm.vcpus, resources),
        memory_mib,
        fs_queues: config.fs.queues,
        fs_cache: config.fs.cache,
        console_ring_kib: vm.console_ring_kib,
        early_console: vm.early_console,
    })
}

/// The configured memory, or the container's limit plus overhead if that is more.
fn memory_mib(config: &Config, resources: Option<&LinuxResources>) -> u64 {
    let limit = resources
        .and_then(|r| r.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit > 0);
    let wanted = limit.map_or(0, |limit| {
        limit
            .div_ceil(MIB)
            .saturating_add(config.vm.memory_overhead_mib)
    });
    wanted.max(config.vm.memory_mib)
}

/// The configured vCPUs, or what the CPU quota is worth, rounded up, if that is more; never more than a VM has.
fn vcpus(configured: u32, resources: Option<&LinuxResources>) -> u32 {
    let cpu = resources.and_then(|r| r.cpu().as_ref());
    let quota = cpu.and_then(|cpu| cpu.quota()).unwrap_or(-1);
    let quota = u64::try_from(quota).unwrap_or(0);
    // The kernel's default period, microseconds.
    let period = cpu.and_then(|cpu| cpu.period()).unwrap_or(100_000).max(1);
    let worth = u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX);
    worth.max(configured).min(MAX_VCPUS)
}

fn guest_path(id: &ContainerId, name: &str) -> PathBuf {
    Path::new(GUEST_SHARED_DIR).join(id).join(name)
}

fn rootfs_plan(id: &ContainerId, bundle: &Bundle) -> MountPlan {
    MountPlan {
        source: bundle.rootfs().unwrap_or_default(),
        container: id.as_str().to_owned(),
        name: ROOTFS_NAME.to_owned(),
        recursive: true,
        attributes: 0,
        recursive_attributes: 0,
    }
}

fn guest_root(mut root: Root, id: &ContainerId) -> Root {
    root.set_path(guest_path(id, ROOTFS_NAME));
    root
}

fn guest_mount(
    id: &ContainerId,
    bundle: &Bundle,
    index: usize,
    mut mount: Mount,
    host: &HostFacts<'_>,
) -> Result<(Mount, Option<MountPlan>), TranslateError> {
    let Some(source) = source_of(bundle, &mount).filter(|_| is_bind(&mount)) else {
        return Ok((mount, None));
    };
    let destination = mount.destination().clone();
    if destination == Path::new("/dev/shm") {
        return Ok((shm(&source, host), None));
    }
    if source == destination
        && let Some(own) = own_kernel_interface(&mount)
    {
        return Ok((own, None));
    }
    if is_kernel_interface(&source) {
        return Err(TranslateError::HostKernel {
            source_path: source,
            destination,
        });
    }
    let name = format!("m{index}");
    let options = mount.options().clone().unwrap_or_default();
    let plan = MountPlan {
        source,
        container: id.as_str().to_owned(),
        recursive: options.iter().any(|option| option == "rbind"),
        attributes: attributes(&options, ""),
        recursive_attributes: attributes(&options, "r"),
        name: name.clone(),
    };
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(guest_path(id, &name)));
    if !options.iter().any(|o| o == "bind" || o == "rbind") {
        let mut options = options;
        options.insert(0, "bind".to_owned());
        mount.set_options(Some(options));
    }
    Ok((mount, Some(plan)))
}

/// `MOUNT_ATTR_*` of mount(8)'s options, or of those that begin with `prefix` (`rro` and the like of runc).
fn attributes(options: &[String], prefix: &str) -> u64 {
    let mut set = 0;
    for option in options {
        let Some(name) = option.strip_prefix(prefix) else {
            continue;
        };
        set |= match name {
            "ro" => libc::MOUNT_ATTR_RDONLY,
            "nosuid" => libc::MOUNT_ATTR_NOSUID,
            "nodev" => libc::MOUNT_ATTR_NODEV,
            "noexec" => libc::MOUNT_ATTR_NOEXEC,
            "noatime" => libc::MOUNT_ATTR_NOATIME,
            "nosymfollow" => libc::MOUNT_ATTR_NOSYMFOLLOW,
            _ => 0,
        };
        if name == "rw" {
            set &= !libc::MOUNT_ATTR_RDONLY;
        }
    }
    set
}

fn is_kernel_interface(path: &Path) -> bool {
    path.starts_with("/proc") || path.starts_with("/sys")
}

/// The guest's own counterpart of a bind of /proc, /sys or /sys/fs/cgroup on itself.
fn own_kernel_interface(mount: &Mount) -> Option<Mount> {
    let typ = match mount.destination().to_str()? {
        "/proc" => "proc",
        "/sys" => "sysfs",
        "/sys/fs/cgroup" => "cgroup",
        _ => return None,
    };
    let mut own = mount.clone();
    let options = mount.options().iter().flatten();
    let kept = options.filter(|o| matches!(o.as_str(), "ro" | "nosuid" | "nodev" | "noexec"));
    own.set_options(Some(kept.cloned().collect()));
    own.set_typ(Some(typ.to_owned()));
    own.set_source(Some(typ.into()));
    Some(own)
}

fn shm(source: &Path, host: &HostFacts<'_>) -> Mount {
    let size = (host.file_system_size)(source);
    let mut options: Vec<String> = ["nosuid", "noexec", "nodev", "mode=1777"]
        .map(str::to_owned)
        .into();
    options.extend(size.map(|bytes| format!("size={bytes}")));
    let mut mount = Mount::default();
    mount
        .set_destination("/dev/shm".into())
        .set_typ(Some("tmpfs".to_owned()))
        .set_source(Some("shm".into()))
        .set_options(Some(options));
    mount
}

/// The `size=` option of a tmpfs, bytes.
fn tmpfs_size(mount: &Mount) -> Option<u64> {
    let options = mount.options().iter().flatten();
    let text = options
        .filter_map(|o| o.strip_prefix("size="))
        .next_back()?;
    let (number, unit) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1 << 10),
        b'm' | b'M' => (&text[..text.len() - 1], 1 << 20),
        b'g' | b'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// Takes `net.*` out of the container's parameters where it has a network of its own: that is the guest's, so the
/// pod gets them. (Without one they stay, and are refused as runc refuses them.)
fn take_network_sysctls(linux: &mut Linux) -> BTreeMap<String, String> {
    let own_network = |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network;
    let namespaces = linux.namespaces().as_ref();
    if !namespaces.is_some_and(|all| all.iter().any(own_network)) {
        return BTreeMap::new();
    }
    let all = linux.sysctl().clone().unwrap_or_default();
    let is_network = |(name, _): &(String, String)| name.replace('/', ".").starts_with("net.");
    let (network, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(is_network);
    linux.set_sysctl(Some(rest.into_iter().collect()));
    network.into_iter().collect()
}

fn guest_linux(mut linux: Linux, id: &ContainerId, warnings: &mut Vec<String>) -> Linux {
    if linux
        .mount_label()
        .as_deref()
        .is_some_and(|l| !l.is_empty())
    {
        warnings.push("linux.mountLabel is ignored: the guest has no SELinux".to_owned());
    }
    linux.set_mount_label(None);
    linux.set_cgroups_path(Some(Path::new("/").join(id)));
    linux.set_namespaces(Some(guest_namespaces(&linux)));
    if let Some(resources) = linux.resources().clone() {
        linux.set_resources(Some(guest_resources(resources, warnings)));
    }
    linux
}

fn guest_namespaces(linux: &Linux) -> Vec<LinuxNamespace> {
    let asked = linux.namespaces().clone().unwrap_or_default();
    let mut types = vec![
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
    ];
    for namespace in asked {
        let typ = namespace.typ();
        if typ != LinuxNamespaceType::Network && !types.contains(&typ) {
            types.push(typ);
        }
    }
    let own = |typ| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(typ).set_path(None);
        namespace
    };
    types.into_iter().map(own).collect()
}

/// Resources that mean the same in the guest. CPU sets and block devices are numbers of the host.
pub fn guest_resources(
    mut resources: LinuxResources,
    warnings: &mut Vec<String>,
) -> LinuxResources {
    if let Some(mut cpu) = resources.cpu().clone() {
        if cpu.cpus().is_some() || cpu.mems().is_some() {
            warnings.push("linux.resources.cpu.cpus and mems are ignored in the guest".to_owned());
        }
        cpu.set_cpus(None).set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut block) = resources.block_io().clone() {
        let devices = [
            block.throttle_read_bps_device().is_some(),
            block.throttle_write_bps_device().is_some(),
            block.throttle_read_iops_device().is_some(),
            block.throttle_write_iops_device().is_some(),
            block.weight_device().is_some(),
        ];
        if devices.contains(&true) {
            let what = "linux.resources.blockIO limits of single devices are ignored in the guest";
            warnings.push(what.to_owned());
        }
        block
            .set_weight_device(None)
            .set_throttle_read_bps_device(None)
            .set_throttle_write_bps_device(None)
            .set_throttle_read_iops_device(None)
            .set_throttle_write_iops_device(None);
        resources.set_block_io(Some(block));
    }
    resources
}

#[cfg(test)]
mod tests;

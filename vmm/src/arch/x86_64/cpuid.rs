// SPDX-License-Identifier: Apache-2.0

//! What CPUID tells the guest: what KVM supports, with the machine's topology and clock put in.
//!
//! Everything starts from KVM_GET_SUPPORTED_CPUID, so that leaves of an unusual KVM pass. Then, per vCPU:
//! its APIC id, one thread per core and one package (leaves 1, 4, 0xb, 0x1f, 0x8000_0008, 0x8000_001d,
//! 0x8000_001e), the TSC's frequency (0x15, 0x4000_0010), the TSC deadline timer and an always running
//! APIC timer (so that Linux neither calibrates nor needs the PIT), and no performance counters.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// KVM's own leaves: signature and highest leaf; features.
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
/// Frequencies of the TSC and of the APIC bus, kHz (as VMware and QEMU have it).
const KVM_FREQUENCY_LEAF: u32 = 0x4000_0010;
/// Frequency of the local APIC's timer in KVM: 1 ns per tick.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Bits of leaf 1.
const ECX_MONITOR: u32 = 1 << 3;
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Leaf 6: the APIC timer never stops.
const EAX_ARAT: u32 = 1 << 2;
/// Leaf 7: MPX, gone from CPUs and kernels.
const EBX_MPX: u32 = 1 << 14;

/// Domain types of leaves 0xb and 0x1f.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What the guest's CPUID has of this machine.
#[derive(Debug, Clone, Copy)]
pub struct CpuidPlan {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u32,
    /// The TSC's frequency, kHz, when KVM tells it.
    pub tsc_khz: Option<u32>,
    /// KVM has the TSC deadline timer.
    pub tsc_deadline: bool,
}

/// CPUID that cannot be built.
#[derive(Debug, thiserror::Error)]
#[error("failed to make a CPUID table of {0} entries")]
pub struct CpuidError(usize);

/// The CPUID of vCPU `id` on a KVM that supports `supported`.
///
/// # Errors
/// When there are more entries than KVM takes.
pub fn for_vcpu(supported: &CpuId, plan: CpuidPlan, id: u32) -> Result<CpuId, CpuidError> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    entries.retain(|entry| !is_topology(entry.function));
    entries.retain(|entry| entry.function != KVM_FREQUENCY_LEAF && entry.function != 0x15);
    for entry in &mut entries {
        adapt(entry, plan, id);
    }
    let highest = highest_leaf(&entries, 0);
    for leaf in [0xb, 0x1f] {
        if highest >= leaf {
            entries.extend(topology(leaf, plan.vcpus, id));
        }
    }
    if let Some(khz) = plan.tsc_khz {
        add_frequencies(&mut entries, khz, highest);
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError(entries.len()))
}

fn is_topology(leaf: u32) -> bool {
    leaf == 0xb || leaf == 0x1f
}

fn highest_leaf(entries: &[kvm_cpuid_entry2], base: u32) -> u32 {
    entries
        .iter()
        .find(|entry| entry.function == base)
        .map_or(base, |entry| entry.eax)
}

/// Bits of an APIC id that tell the cores of the package apart.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, plan: CpuidPlan, id: u32) {
    let many = plan.vcpus > 1;
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | (plan.vcpus << 16) | (id << 24);
            entry.ecx &= !(ECX_MONITOR | ECX_PDCM | ECX_TSC_DEADLINE);
            entry.ecx |= ECX_HYPERVISOR;
            if plan.tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            set(&mut entry.edx, EDX_HTT, many);
        }
        // Deterministic cache parameters, Intel (4) and AMD (0x8000_001d): types 0 is the end of the list.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 {
                (1 << core_bits(plan.vcpus)) - 1
            } else {
                0
            };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
            if entry.function == 0x4 {
                entry.eax |= ((1 << core_bits(plan.vcpus)) - 1) << 26;
            }
        }
        0x6 => {
            entry.eax = EAX_ARAT;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0x7 if entry.index == 0 => entry.ebx &= !EBX_MPX,
        // No performance monitoring: its counters belong to the host.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0008 => {
            // Threads in the package less one, and how many bits of the APIC id they take.
            entry.ecx = (plan.vcpus - 1) | (core_bits(plan.vcpus) << 12);
        }
        0x8000_001e => {
            // Extended APIC id; core id with one thread per core; node 0 of one.
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id & 0xff, 0, 0);
        }
        _ => {}
    }
}

fn set(word: &mut u32, bit: u32, on: bool) {
    if on {
        *word |= bit;
    } else {
        *word &= !bit;
    }
}

fn topology(leaf: u32, vcpus: u32, id: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | (kind << 8),
        edx: id,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, core_bits(vcpus), vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn add_frequencies(entries: &mut Vec<kvm_cpuid_entry2>, khz: u32, highest: u32) {
    if highest >= 0x15 {
        // TSC = crystal * ebx / eax, with the local APIC's timer as the crystal, as Linux takes it.
        entries.push(kvm_cpuid_entry2 {
            function: 0x15,
            eax: APIC_BUS_KHZ,
            ebx: khz,
            ecx: APIC_BUS_KHZ * 1000,
            ..Default::default()
        });
    }
    let signature = entries
        .iter_mut()
        .find(|entry| entry.function == KVM_SIGNATURE_LEAF);
    if let Some(signature) = signature {
        signature.eax = signature.eax.max(KVM_FREQUENCY_LEAF);
        entries.push(kvm_cpuid_entry2 {
            function: KVM_FREQUENCY_LEAF,
            eax: khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let entries = [
            leaf(0, 0x1f),
            kvm_cpuid_entry2 {
                ecx: ECX_MONITOR,
                ebx: 0xdead_0800,
                ..leaf(1, 0x306a9)
            },
            kvm_cpuid_entry2 {
                index: 3,
                ..leaf(4, 0xffff_c063)
            },
            leaf(6, 0x77),
            leaf(0xa, 0x0730_0404),
            kvm_cpuid_entry2 {
                edx: 99,
                ..leaf(0xb, 7)
            },
            leaf(0x15, 2),
            leaf(0x4000_0000, 0x4000_0001),
            leaf(0x4000_00aa, 0x1234),
            leaf(0x8000_0008, 0x3030),
        ];
        CpuId::from_entries(&entries).unwrap()
    }

    fn plan(vcpus: u32) -> CpuidPlan {
        CpuidPlan {
            vcpus,
            tsc_khz: Some(2_500_000),
            tsc_deadline: true,
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = cpuid
            .as_slice()
            .iter()
            .filter(|entry| entry.function == function && entry.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x} is there twice");
        entry
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_everywhere() {
        for id in [0, 1, 31] {
            let cpuid = for_vcpu(&supported(), plan(32), id).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ebx, 0x0800 | (32 << 16) | (id << 24));
            for index in 0..3 {
                assert_eq!(find(&cpuid, 0xb, index).edx, id);
                assert_eq!(find(&cpuid, 0x1f, index).edx, id);
            }
        }
    }

    #[test]
    fn cores_are_in_one_package_with_a_shared_last_cache() {
        let cpuid = for_vcpu(&supported(), plan(6), 0).unwrap();
        let core = find(&cpuid, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 1 | (2 << 8)));
        let cache = find(&cpuid, 4, 3).eax;
        assert_eq!(((cache >> 14) & 0xfff, cache >> 26), (7, 7));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 5 | (3 << 12));
    }

    #[test]
    fn the_tsc_frequency_is_told_in_both_ways() {
        let cpuid = for_vcpu(&supported(), plan(1), 0).unwrap();
        let leaf = find(&cpuid, 0x15, 0);
        let hertz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
        assert_eq!(hertz, 2_500_000_000);
        assert_eq!(find(&cpuid, KVM_FREQUENCY_LEAF, 0).eax, 2_500_000);
        assert_eq!(find(&cpuid, KVM_SIGNATURE_LEAF, 0).eax, KVM_FREQUENCY_LEAF);
    }

    #[test]
    fn leaves_of_an_unusual_kvm_pass_and_counters_do_not() {
        let cpuid = for_vcpu(&supported(), plan(1), 0).unwrap();
        assert_eq!(find(&cpuid, 0x4000_00aa, 0).eax, 0x1234);
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(find(&cpuid, 6, 0).eax, EAX_ARAT);
        let ecx = find(&cpuid, 1, 0).ecx;
        assert_eq!(ecx & (ECX_MONITOR | ECX_HYPERVISOR), ECX_HYPERVISOR);
    }
}

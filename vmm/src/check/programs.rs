// SPDX-License-Identifier: Apache-2.0

//! The guest programs of the check, as assembly that is put together with this file.
//!
//! They lie in read-only data, are never run by the host, and do not depend on their address. See
//! [`super::guest`] for the machine around them.

use std::arch::global_asm;

/// A guest program.
#[derive(Debug)]
pub struct Program {
    /// What it is about.
    pub name: &'static str,
    bounds: fn() -> (*const u8, *const u8),
}

impl Program {
    /// Its machine code, for 64-bit mode at any address.
    pub fn code(&self) -> &'static [u8] {
        let (start, end) = (self.bounds)();
        let length = end.addr().saturating_sub(start.addr());
        // SAFETY: both are labels of one piece of assembly below, `end` after `start`, in read-only data of this
        // program that lives as long as it does.
        unsafe { std::slice::from_raw_parts(start, length) }
    }
}

/// Declares a program: its instructions between two labels, and how to find them.
macro_rules! programs {
    ($($label:ident $name:literal { $($line:literal)* })*) => {
        $(global_asm!(
            ".pushsection .rodata.caisson_probe,\"a\",@progbits",
            concat!(".globl caisson_probe_", stringify!($label)),
            concat!(".hidden caisson_probe_", stringify!($label)),
            concat!("caisson_probe_", stringify!($label), ":"),
            $($line,)*
            concat!(".globl caisson_probe_", stringify!($label), "_end"),
            concat!(".hidden caisson_probe_", stringify!($label), "_end"),
            concat!("caisson_probe_", stringify!($label), "_end:"),
            ".popsection",
        );)*

        /// All programs. Each ends at `hlt` with `0x600d` in `rax` when its result is right.
        pub static PROGRAMS: [Program; [$(stringify!($label)),*].len()] = [$(Program {
            name: $name,
            bounds: || {
                unsafe extern "C" {
                    #[link_name = concat!("caisson_probe_", stringify!($label))]
                    static START: u8;
                    #[link_name = concat!("caisson_probe_", stringify!($label), "_end")]
                    static END: u8;
                }
                (&raw const START, &raw const END)
            },
        }),*];
    };
}

programs! {
    long_mode "long mode" {
        "mov eax, 0x600d"
        "hlt"
    }
    cpuid "cpuid" {
        "xor eax, eax"
        "cpuid"
        "test ebx, ebx"
        "jz 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
    }
    tsc "rdtsc" {
        "rdtsc"
        "mov rsi, rdx"
        "shl rsi, 32"
        "or rsi, rax"
        "rdtsc"
        "shl rdx, 32"
        "or rax, rdx"
        "cmp rax, rsi"
        "jb 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
    }
    msr "wrmsr, rdmsr" {
        "mov ecx, 0xc0000082"
        "mov eax, 0x12345678"
        "mov edx, 0x7fff"
        "wrmsr"
        "xor eax, eax"
        "xor edx, edx"
        "rdmsr"
        "cmp eax, 0x12345678"
        "jne 7f"
        "cmp edx, 0x7fff"
        "jne 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
    }
    xsave "xsetbv, xsave, xrstor" {
        "xor ecx, ecx"
        "xor edx, edx"
        "mov eax, 3"
        "xsetbv"
        "mov rsi, 0x1122334455667788"
        "movq xmm0, rsi"
        "mov edi, 0x20000"
        "mov eax, 3"
        "xsave [rdi]"
        "pxor xmm0, xmm0"
        "mov eax, 3"
        "xrstor [rdi]"
        "movq rax, xmm0"
        "cmp rax, rsi"
        "jne 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
    }
    cx16 "cmpxchg16b" {
        "mov edi, 0x20000"
        "mov qword ptr [rdi], 1"
        "mov qword ptr [rdi+8], 2"
        "mov eax, 1"
        "mov edx, 2"
        "mov ebx, 3"
        "mov ecx, 4"
        "lock cmpxchg16b [rdi]"
        "jne 7f"
        "cmp qword ptr [rdi], 3"
        "jne 7f"
        "cmp qword ptr [rdi+8], 4"
        "jne 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
    }
    // The gate of vector 3 is at 0x5030: it is pointed to a handler of its own.
    int3 "int3, iretq" {
        "lea rax, [rip+2f]"
        "mov word ptr [0x5030], ax"
        "shr rax, 16"
        "mov word ptr [0x5036], ax"
        "xor ebx, ebx"
        "int3"
        "cmp ebx, 0x33"
        "jne 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
        "2:"
        "mov ebx, 0x33"
        "iretq"
    }
    // 4 MiB is not mapped. The gate of vector 14 is at 0x50e0.
    page_fault "page fault" {
        "lea rax, [rip+2f]"
        "mov word ptr [0x50e0], ax"
        "shr rax, 16"
        "mov word ptr [0x50e6], ax"
        "mov eax, 0x400000"
        "mov rbx, [rax]"
        "mov eax, 1"
        "hlt"
        "2:"
        "mov rax, cr2"
        "cmp eax, 0x400000"
        "jne 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 2"
        "hlt"
    }
    // To ring 3 by iretq, back by syscall. STAR: kernel 0x08, user 0x10 (+8 data, +16 code).
    ring3 "ring 3, syscall" {
        "mov ecx, 0xc0000081"
        "xor eax, eax"
        "mov edx, 0x00100008"
        "wrmsr"
        "mov ecx, 0xc0000082"
        "lea rax, [rip+3f]"
        "xor edx, edx"
        "wrmsr"
        "mov ecx, 0xc0000084"
        "xor eax, eax"
        "xor edx, edx"
        "wrmsr"
        "push 0x1b"
        "push 0xe000"
        "push 2"
        "push 0x23"
        "lea rax, [rip+2f]"
        "push rax"
        "iretq"
        "2:"
        "mov ebx, 0x77"
        "syscall"
        "ud2"
        "3:"
        "cmp ebx, 0x77"
        "jne 7f"
        "mov eax, 0x600d"
        "hlt"
        "7:"
        "mov eax, 1"
        "hlt"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_has_code_of_its_own_that_ends_at_hlt() {
        const HLT: u8 = 0xf4;
        for program in &PROGRAMS {
            let code = program.code();
            assert!((6..256).contains(&code.len()), "{}", program.name);
            assert!(code.contains(&HLT), "{}", program.name);
        }
        assert_eq!(PROGRAMS[0].code(), [0xb8, 0x0d, 0x60, 0, 0, HLT]);
    }
}

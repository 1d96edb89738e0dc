// SPDX-License-Identifier: Apache-2.0

//! Boots that are not the usual one.

use crate::parts::Config;
use crate::support::{Bundle, show};

#[test]
fn a_boot_that_says_all_it_can_on_the_early_console_comes_up() {
    // Slow enough for timers that the kernel has not taken over yet to fire.
    let config = Config::with("[vm]\nkernel_params = \"loglevel=8\"\nearly_console = true\n");
    let bundle = Bundle::sh("echo up").options(&["--config", &config.file()]);
    assert_eq!(bundle.stdout(), "up\n");
}

#[test]
fn guests_of_many_sizes_come_up() {
    for (memory, vcpus) in [(48, 1), (256, 4), (3500, 2)] {
        let config = Config::with(&format!("[vm]\nmemory_mib = {memory}\nvcpus = {vcpus}\n"));
        let script = "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo";
        let bundle = Bundle::sh(script).options(&["--config", &config.file()]);
        let output = bundle.run();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        let [cpus, total] = numbers[..] else {
            panic!("{memory} MiB, {vcpus} CPUs: {}", show(&output));
        };
        println!("{memory} MiB, {vcpus} CPUs: {total} MiB in all");
        assert_eq!(cpus, vcpus);
        // The kernel and its page structures take some.
        assert!(
            total < memory && total + 40 + memory / 32 > memory,
            "{memory}: {total}"
        );
    }
}

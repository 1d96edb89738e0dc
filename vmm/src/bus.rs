// SPDX-License-Identifier: Apache-2.0

//! From an address to the device behind it.
//!
//! Two maps, ports and memory, made before the vCPUs run and never changed. An access that no device has
//! reads as all ones and writes to nothing, as on a PC.

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A device on the bus. Called by every vCPU thread.
pub trait BusDevice: Send + Sync + fmt::Debug {
    /// Reads `data.len()` (1 to 8) bytes at `offset` from the device's start. What is not written reads as
    /// zero.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes 1 to 8 bytes at `offset` from the device's start.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Devices that cannot be put on the bus together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices in one place.
    #[error("a device at {base:#x} with {size:#x} bytes overlaps another")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// No room, or beyond the address space.
    #[error("a device at {base:#x} cannot have {size:#x} bytes")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
}

#[derive(Debug)]
struct Slot {
    base: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space.
#[derive(Debug, Default)]
pub struct Bus {
    /// Sorted by base, without overlaps.
    slots: Vec<Slot>,
    missed: AtomicU64,
}

impl Bus {
    /// Puts `device` at `base`.
    ///
    /// # Errors
    /// When the range is empty, wraps, or overlaps another device.
    pub fn insert(
        &mut self,
        base: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        if size == 0 || base.checked_add(size - 1).is_none() {
            return Err(BusError::BadRange { base, size });
        }
        let at = self.slots.partition_point(|slot| slot.base < base);
        let before = at.checked_sub(1).and_then(|index| self.slots.get(index));
        let after = self.slots.get(at);
        if before.is_some_and(|slot| base - slot.base < slot.size)
            || after.is_some_and(|slot| slot.base - base < size)
        {
            return Err(BusError::Overlap { base, size });
        }
        self.slots.insert(at, Slot { base, size, device });
        Ok(())
    }

    /// Reads from the device at `address`; all ones when there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((slot, offset)) => {
                data.fill(0);
                slot.device.read(offset, data);
            }
            None => {
                self.missed.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// Writes to the device at `address`, if there is one.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((slot, offset)) => slot.device.write(offset, data),
            None => {
                self.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Accesses so far that no device has.
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// The device that holds all of the access, and where in it.
    fn find(&self, address: u64, length: usize) -> Option<(&Slot, u64)> {
        let at = self.slots.partition_point(|slot| slot.base <= address);
        let slot = self.slots.get(at.checked_sub(1)?)?;
        let offset = address - slot.base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= slot.size).then_some((slot, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data[0] = 0x5a;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_holds_all_of_it() {
        let (low, high) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x1000, high.clone()).unwrap();
        bus.insert(0x1000, 0x1000, low.clone()).unwrap();
        let mut data = [0xaa; 4];
        bus.read(0x1ffc, &mut data);
        assert_eq!(data, [0x5a, 0, 0, 0]);
        bus.write(0x2000, &[1]);
        bus.read(0x1ffd, &mut data);
        assert_eq!(data, [0xff; 4], "an access over the end is nobody's");
        bus.write(0xfff, &[1]);
        bus.write(0x3000, &[1]);
        bus.read(u64::MAX, &mut data);
        assert_eq!(*low.0.lock().unwrap(), [(0xffc, 4)]);
        assert_eq!(*high.0.lock().unwrap(), [(0, 1)]);
        assert_eq!(bus.missed(), 4);
    }

    #[test]
    fn devices_do_not_overlap() {
        let device = || Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x1000, device()).unwrap();
        for (base, size) in [(0x1000, 1), (0x1fff, 1), (0xfff, 2), (0, 0x10000)] {
            assert_eq!(
                bus.insert(base, size, device()),
                Err(BusError::Overlap { base, size })
            );
        }
        assert!(bus.insert(0x2000, 1, device()).is_ok());
        assert!(bus.insert(0x5000, 0, device()).is_err());
        assert!(bus.insert(u64::MAX, 2, device()).is_err());
    }
}

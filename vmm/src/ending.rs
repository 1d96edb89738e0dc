// SPDX-License-Identifier: Apache-2.0

//! The end of a machine: who sees it first says why.
//!
//! vCPUs, devices and the control socket hold a clone of [`Ending`]. The first cause counts; it wakes the main
//! thread and keeps every vCPU from going on.

use std::sync::{Arc, Mutex, PoisonError};

use caisson_protocol::control::ExitCause;
use vmm_sys_util::eventfd::EventFd;

use crate::gate::Gate;

/// Where the end is reported.
#[derive(Debug, Clone)]
pub struct Ending {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cause: Mutex<Option<ExitCause>>,
    event: EventFd,
    gate: Arc<Gate>,
}

impl Ending {
    /// An end that has not come yet; `gate` is shut when it comes.
    ///
    /// # Errors
    /// When there is no eventfd.
    pub fn new(gate: Arc<Gate>) -> std::io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                cause: Mutex::new(None),
                event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                gate,
            }),
        })
    }

    /// The machine ends because of `cause`, unless it ends already.
    pub fn report(&self, cause: ExitCause) {
        let mut first = self
            .shared
            .cause
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(cause);
            self.shared.gate.stop();
            if let Err(error) = self.shared.event.write(1) {
                log::error!("failed to report the end of the machine: {error}");
            }
        }
    }

    /// Becomes readable when the end is reported.
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// Why the machine ended, when it did.
    pub fn cause(&self) -> Option<ExitCause> {
        self.shared
            .cause
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_counts_and_shuts_the_gate() {
        let gate = Arc::new(Gate::new());
        let ending = Ending::new(gate.clone()).unwrap();
        assert_eq!(ending.cause(), None);
        ending.clone().report(ExitCause::TripleFault {});
        ending.report(ExitCause::Stopped {});
        assert_eq!(ending.cause(), Some(ExitCause::TripleFault {}));
        assert_eq!(ending.event().read().unwrap(), 1);
        assert!(!gate.pass());
    }
}

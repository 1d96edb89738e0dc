// SPDX-License-Identifier: Apache-2.0

//! Caisson: runtime.

// SPDX-License-Identifier: Apache-2.0

//! Generates the messages and the ttRPC client and service of `proto/agent.proto`.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    Codegen::new()
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // `include!` takes no inner attributes, so the list of modules is written here.
    let out: PathBuf = std::env::var_os("OUT_DIR")
        .ok_or("OUT_DIR is not set")?
        .into();
    std::fs::write(
        out.join("modules.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )?;
    Ok(())
}

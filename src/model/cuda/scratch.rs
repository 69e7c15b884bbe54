//! What passes through the layers of a batch, on the device.

use std::sync::Arc;

use super::linear::LinearScratch;
use super::placed::DeviceModel;
use crate::ops::cuda::rows::SinksJob;
use crate::ops::cuda::seal::SealedJob;
use crate::ops::cuda::{CudaError, Device, Memory, Pinned};

/// Activations of a batch.
pub(super) struct Scratch {
    pub(super) tokens: Memory<u32>,
    pub(super) positions: Memory<u32>,
    pub(super) pages: Memory<u32>,
    pub(super) picked: Memory<u32>,
    pub(super) x: Memory<f32>,
    pub(super) picked_x: Memory<f32>,
    pub(super) normed: Memory<u16>,
    pub(super) q: Memory<f32>,
    pub(super) k: Memory<f32>,
    pub(super) v: Memory<f32>,
    pub(super) attended: Memory<u16>,
    pub(super) gated: Memory<u16>,
    /// Where they do not become one at once.
    pub(super) gate: Memory<f32>,
    pub(super) up: Memory<f32>,
    pub(super) linear: LinearScratch,
    pub(super) logits: Memory<f32>,
    pub(super) jobs: Memory<SealedJob>,
    pub(super) sinks: Memory<SinksJob>,
    pub(super) latents: Memory<f32>,
    pub(super) host_logits: Pinned<f32>,
}

impl Scratch {
    /// No room yet.
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let d = device;
        Ok(Scratch {
            tokens: d.alloc(1)?,
            positions: d.alloc(1)?,
            pages: d.alloc(1)?,
            picked: d.alloc(1)?,
            x: d.alloc(1)?,
            picked_x: d.alloc(1)?,
            normed: d.alloc(1)?,
            q: d.alloc(1)?,
            k: d.alloc(1)?,
            v: d.alloc(1)?,
            attended: d.alloc(1)?,
            gated: d.alloc(1)?,
            gate: d.alloc(1)?,
            up: d.alloc(1)?,
            linear: LinearScratch::new(d)?,
            logits: d.alloc(1)?,
            jobs: d.alloc(1)?,
            sinks: d.alloc(1)?,
            latents: d.alloc(1)?,
            host_logits: Pinned::new(d, 1)?,
        })
    }

    /// Room for what passes through a layer of so many positions; under adapters, and where gate and up are apart.
    pub(super) fn reserve(&mut self, model: &DeviceModel, tokens: usize, (adapted, apart): (bool, bool)) -> Result<(), CudaError> {
        let (c, s) = (model.config, self);
        s.positions.reserve(tokens)?;
        s.pages.reserve(tokens)?;
        s.x.reserve(tokens * c.hidden)?;
        s.normed.reserve(tokens * c.hidden)?;
        s.q.reserve(tokens * c.q_channels())?;
        s.k.reserve(tokens * c.kv_channels())?;
        s.v.reserve(tokens * c.kv_channels())?;
        s.attended.reserve(tokens * c.q_channels())?;
        s.gated.reserve(tokens * c.intermediate)?;
        if adapted || apart {
            s.gate.reserve(tokens * c.intermediate)?;
            s.up.reserve(tokens * c.intermediate)?;
        }
        s.linear.reserve(if adapted { tokens * c.hidden } else { 0 }, tokens * model.ranks)
    }

    /// Room for `rows` whose logits are asked for.
    pub(super) fn reserve_heads(&mut self, model: &DeviceModel, rows: usize) -> Result<(), CudaError> {
        let c = model.config;
        self.picked.reserve(rows)?;
        self.picked_x.reserve(rows * c.hidden)?;
        self.normed.reserve(rows * c.hidden)?;
        self.logits.reserve(rows * c.vocab)
    }

    /// Adds where all of it lies, which launches name.
    pub(super) fn key(&self, key: &mut Vec<u64>) {
        key.extend([&self.x, &self.picked_x, &self.q, &self.k, &self.v, &self.logits].map(Memory::ptr));
        key.extend([&self.tokens, &self.positions, &self.pages, &self.picked].map(Memory::ptr));
        key.extend([&self.normed, &self.attended, &self.gated].map(Memory::ptr));
        key.extend([&self.gate, &self.up].map(Memory::ptr));
        self.linear.key(key);
    }
}

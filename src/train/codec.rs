//! What the reader of a sealed page sees of latents: the one place where training meets the quantiser.
//!
//! Both functions replace latents by the numbers their codes stand for (`compress::seen`), through the very codec that serves. Latents
//! of sinks are never read, take no part in scales, and stay as they are. With 16 bits nothing changes: f16 rounds by 2^-11, nothing
//! beside what a rank drops.

use crate::compress::seen::{self, Coding};
use crate::kv::layout::{Cskv, Widths};
use crate::quant::Rotation;

/// How the latents of one layer are stored.
#[derive(Clone, Debug)]
pub struct Codec {
    keys: Coding,
    values: Coding,
    sinks: usize,
    /// What turns key latents before they are stored, where that is no part of their map.
    rotation: Option<Rotation>,
}

impl Codec {
    /// Of a layer of `widths` under a profile, on a model of so many KV heads.
    pub fn new(cskv: &Cskv, widths: &Widths, kv_heads: usize, rotation: Option<Rotation>) -> Self {
        let blocks = cskv.basis.blocks(kv_heads);
        Codec {
            keys: Coding { width: widths.keys, quantiser: cskv.key_quantiser, blocks },
            values: Coding { width: widths.values, quantiser: cskv.value_quantiser, blocks },
            sinks: cskv.sinks as usize,
            rotation,
        }
    }

    /// Key latents `[n][rank]`, the first at `position`.
    ///
    /// A last page that is not full shares its scales over what there is of it; serving would not have sealed it yet.
    pub fn keys(&self, latents: &mut [f32], position: usize) {
        if self.keys.width.bits == 16 {
            return;
        }
        if let Some(rotation) = &self.rotation {
            latents.chunks_exact_mut(rotation.size()).for_each(|block| rotation.apply(block, 1));
        }
        seen::keys(latents, self.keys, position, self.sinks);
        if let Some(rotation) = &self.rotation {
            latents.chunks_exact_mut(rotation.size()).for_each(|block| rotation.undo(block));
        }
    }

    /// Value latents `[n][rank]`, the first at `position`.
    pub fn values(&self, latents: &mut [f32], position: usize) {
        let rank = self.values.width.rank;
        if self.values.width.bits < 16 && rank > 0 {
            let skip = self.sinks.saturating_sub(position).min(latents.len() / rank);
            seen::values(&mut latents[skip * rank..], self.values);
        }
    }
}

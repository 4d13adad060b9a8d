//! Softmax attention: projections, head norms, rotation, softmax, output.

use mlx_quant_engine::{Activation, AttentionSettings, LAST, REST, Result, Tensor};

use super::pass::{Pass, scaled};
use super::state::Keys;
use crate::decoder::{Attention, HeadNorms, Norm, OutputGate, Projections, QueryScaling};

/// Queries, keys, values `[batch, tokens, heads, features]`.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Of the output: `[batch, tokens, heads * features]`, or `[batch, tokens, heads]`.
    gate: Option<Tensor>,
}

impl Pass<'_> {
    pub(super) async fn attention(
        &mut self,
        layer: &Attention,
        index: usize,
        x: &Tensor,
        keys: &mut Keys,
    ) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?; // [b, t, hidden]
        let mut heads = self.heads(layer, x, keys).await?;
        if let Some(norms) = layer.norms.as_ref().filter(|norms| !norms.after_rope) {
            self.norm_heads(layer, norms, &mut heads)?;
        }
        if let Some(rope) = layer.rope {
            heads.q = self.rotate(&heads.q, rope)?;
            if !matches!(layer.projections, Projections::Shared { .. }) {
                heads.k = self.rotate(&heads.k, rope)?;
            }
        }
        if let Some(norms) = layer.norms.as_ref().filter(|norms| norms.after_rope) {
            self.norm_heads(layer, norms, &mut heads)?;
        }
        if layer.keep_keys {
            keys.insert(index, (heads.k.clone(), heads.v.clone()));
        }
        if let Some(scaling) = &layer.query_scaling {
            heads.q = heads.q.broadcast_mul(&scaling.factors(tokens, &heads.q)?)?;
        }
        let settings = AttentionSettings {
            scale: layer.scale as f32,
            window: layer.window,
            softcap: layer.softcap.map(|cap| cap as f32),
            sinks: layer.sinks.as_ref().map(|name| self.parameters.tensor(name)).transpose()?.cloned(),
        };
        let output = self.scores_by_chunk(layer.chunk, &heads, &settings)?; // [b, t, h, dv]
        let output =
            self.gated(layer, heads, &output)?.reshape((batch, tokens, layer.heads * layer.value_dim))?;
        Ok(self.read(&[&layer.output], &output).await?.remove(0))
    }

    /// Softmax attention, of each chunk of tokens alone where there are chunks.
    fn scores_by_chunk(
        &self,
        chunk: Option<usize>,
        heads: &Heads,
        settings: &AttentionSettings,
    ) -> Result<Tensor> {
        let tokens = heads.q.dim(1)?;
        let chunk = chunk.unwrap_or(tokens).clamp(1, tokens.max(1));
        if chunk == tokens {
            return self.engine.attention(&heads.q, &heads.k, &heads.v, settings);
        }
        let attend = |start: usize| {
            let part = |x: &Tensor| x.narrow(1, start, chunk.min(tokens - start));
            self.engine.attention(&part(&heads.q)?, &part(&heads.k)?, &part(&heads.v)?, settings)
        };
        let parts = (0..tokens).step_by(chunk).map(attend).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&parts, 1)
    }

    /// What attention gives (`[batch, tokens, heads, features]`) times the gate, if there is one.
    fn gated(&self, layer: &Attention, heads: Heads, output: &Tensor) -> Result<Tensor> {
        let Some(gate) = heads.gate else { return Ok(output.clone()) };
        let (activation, per_head) = match &layer.output_gate {
            Some(OutputGate::Linear { activation, per_head, .. }) => (*activation, *per_head),
            _ => (Activation::Sigmoid, false),
        };
        if per_head {
            return output.broadcast_mul(&self.engine.activate(&gate, activation)?.unsqueeze(3)?);
        }
        self.engine.glu(&gate, &output.reshape(gate.dims())?, activation)
    }

    /// The projections of x, by head.
    async fn heads(&mut self, layer: &Attention, x: &Tensor, keys: &Keys) -> Result<Heads> {
        let (batch, tokens, _) = x.dims3()?;
        let &Attention { heads, kv_heads, head_dim, value_dim, .. } = layer;
        let by_head = |x: &Tensor, heads: usize| x.reshape((batch, tokens, heads, REST));
        let readers: Vec<_> = layer.projections.linears().into_iter().chain(layer.gate()).collect();
        let mut projected = self.read(&readers, x).await?;
        if let Some(most) = layer.clip {
            projected = projected.iter().map(|x| x.clamp(-most, most)).collect::<Result<_>>()?;
        }
        let own_gate = layer.gate().and_then(|_| projected.pop());
        let first = projected.remove(0);
        let (q, k, v) = match &layer.projections {
            Projections::Separate { .. } => {
                let k = by_head(&projected.remove(0), kv_heads)?;
                (first, k, by_head(&projected.remove(0), kv_heads)?)
            }
            Projections::KeysAsValues { .. } => {
                let k = by_head(&projected.remove(0), kv_heads)?;
                (first, k.clone(), k)
            }
            Projections::Concatenated(_) => {
                let (q, k) = (heads * head_dim, kv_heads * head_dim);
                let part = |start, length| first.narrow(2, start, length);
                let (k, v) = (part(q, k)?, part(q + k, kv_heads * value_dim)?);
                (part(0, q)?, by_head(&k, kv_heads)?, by_head(&v, kv_heads)?)
            }
            Projections::Interleaved(_) => {
                let queries = heads / kv_heads * head_dim; // features of the queries that a key head serves
                let all = first.reshape((batch, tokens, kv_heads, queries + head_dim + value_dim))?;
                let q = all.narrow(3, 0, queries)?.reshape((batch, tokens, REST))?;
                (q, all.narrow(3, queries, head_dim)?, all.narrow(3, queries + head_dim, value_dim)?)
            }
            Projections::Shared { block, .. } => {
                let missing = || mlx_quant_engine::Error::msg(format!("block {block} kept no keys"));
                let (k, v) = keys.get(block).ok_or_else(missing)?;
                (first, k.clone(), v.clone())
            }
        };
        let v = scaled(v, layer.value_multiplier)?;
        let q = by_head(&q, heads)?;
        if !layer.gated_with_queries() {
            return Ok(Heads { q, k, v, gate: own_gate });
        }
        let gate = q.narrow(LAST, head_dim, head_dim)?.reshape((batch, tokens, heads * head_dim))?;
        Ok(Heads { q: q.narrow(LAST, 0, head_dim)?, k, v, gate: Some(gate) })
    }

    fn norm_heads(&self, layer: &Attention, norms: &HeadNorms, heads: &mut Heads) -> Result<()> {
        let apply = |norm: &Norm, x: &Tensor| {
            if !norms.flat {
                return self.norm(norm, x);
            }
            let shape = x.dims4()?;
            self.norm(norm, &x.reshape((shape.0, shape.1, shape.2 * shape.3))?)?.reshape(shape)
        };
        heads.q = apply(&norms.q, &heads.q)?;
        if matches!(layer.projections, Projections::Shared { .. }) {
            return Ok(());
        }
        if let Some(norm) = &norms.k {
            heads.k = apply(norm, &heads.k)?;
        }
        if let Some(norm) = &norms.v {
            heads.v = apply(norm, &heads.v)?;
        }
        Ok(())
    }
}

impl QueryScaling {
    /// `[tokens, 1, 1]`.
    pub(super) fn factors(&self, tokens: usize, like: &Tensor) -> Result<Tensor> {
        let factor = |position: usize| {
            let position = (self.first + position) as f64;
            (1.0 + self.beta * (1.0 + (position / self.original).floor()).ln()) as f32
        };
        scaled(Tensor::from_vec((0..tokens).map(factor).collect(), (tokens, 1, 1), like.device())?, 1.0)
    }
}

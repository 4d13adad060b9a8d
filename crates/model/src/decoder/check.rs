//! A description against the tensors that are there: nothing missing, nothing unread, every shape as the config says.

use std::collections::BTreeMap;

use super::{
    Attention, Block, Decoder, DeltaNet, DeltaProjections, Gate, LatentAttention, LatentKeys, LatentQueries,
    Layer, LightningAttention, Linear, Mamba, Mlp, Norm, NormKind, OutputGate, Projections,
};

/// Length of an axis; `None`: any.
type Axis = Option<usize>;

/// What a tensor must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Axes after decoding, outermost first; `None` where any length will do.
    pub shape: Vec<Option<usize>>,
    /// Whether it may be missing.
    pub optional: bool,
}

impl ExpectedTensor {
    /// Whether a tensor of this shape is one.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let fits = |(found, expected): (&usize, &Option<usize>)| expected.is_none_or(|axis| axis == *found);
        shape.len() == self.shape.len() && shape.iter().zip(&self.shape).all(fits)
    }
}

/// Every tensor that a description reads, by name.
#[derive(Debug, Default)]
pub(crate) struct Reads(pub(crate) BTreeMap<String, ExpectedTensor>);

impl Reads {
    fn tensor(&mut self, name: String, shape: &[Axis]) {
        self.0.insert(name, ExpectedTensor { shape: shape.to_vec(), optional: false });
    }

    fn optional(&mut self, name: String, shape: &[Axis]) {
        self.0.insert(name, ExpectedTensor { shape: shape.to_vec(), optional: true });
    }

    /// A matrix and its bias, stacked if `experts` says of how many.
    fn linear(&mut self, linear: &Linear, out: Axis, columns: Axis, experts: Option<usize>) {
        let stacked =
            |rest: &[Axis]| experts.into_iter().map(Some).chain(rest.iter().copied()).collect::<Vec<_>>();
        self.tensor(format!("{}.weight", linear.path), &stacked(&[out, columns]));
        self.optional(format!("{}.bias", linear.path), &stacked(&[out]));
    }

    fn norm(&mut self, norm: &Norm, features: usize, heads: usize) {
        let Some(path) = &norm.path else { return };
        // One weight for each head, in one tensor or in several.
        let whole = if path.contains("{head}") { 1 } else { heads };
        for head in 0..heads / whole.max(1) {
            let path = path.replace("{head}", &head.to_string());
            self.tensor(format!("{path}.weight"), &[Some(features)]);
            if norm.kind == NormKind::Layer {
                self.optional(format!("{path}.bias"), &[Some(features)]);
            }
        }
    }

    fn attention(&mut self, attention: &Attention, hidden: usize) {
        let &Attention { heads, kv_heads, head_dim, value_dim, .. } = attention;
        let (q, k, v) = (heads * head_dim, kv_heads * head_dim, kv_heads * value_dim);
        let query_rows = if attention.gated_with_queries() { 2 * q } else { q };
        let hidden = Some(hidden);
        match &attention.projections {
            Projections::Separate { q: query, k: key, v: value } => {
                self.linear(query, Some(query_rows), hidden, None);
                self.linear(key, Some(k), hidden, None);
                self.linear(value, Some(v), hidden, None);
            }
            Projections::KeysAsValues { q: query, k: key } => {
                self.linear(query, Some(query_rows), hidden, None);
                self.linear(key, Some(k), hidden, None);
            }
            Projections::Concatenated(linear) | Projections::Interleaved(linear) => {
                self.linear(linear, Some(q + k + v), hidden, None);
            }
            Projections::Shared { q: query, unread, .. } => {
                self.linear(query, Some(query_rows), hidden, None);
                if let Some([key, value]) = unread {
                    self.linear(key, Some(k), hidden, None);
                    self.linear(value, Some(v), hidden, None);
                }
            }
        }
        self.linear(&attention.output, hidden, Some(heads * value_dim), None);
        if let Some(OutputGate::Linear { linear, per_head, .. }) = &attention.output_gate {
            let rows = if *per_head { heads } else { heads * value_dim };
            self.linear(linear, Some(rows), hidden, None);
        }
        if let Some(norms) = &attention.norms {
            let lacks = matches!(attention.projections, Projections::Shared { unread: None, .. });
            let keys = norms.k.as_ref().filter(|_| !lacks);
            for (norm, heads) in std::iter::once((&norms.q, heads)).chain(keys.map(|norm| (norm, kv_heads))) {
                if let (true, Some(path)) = (norms.per_head, &norm.path) {
                    self.tensor(format!("{path}.weight"), &[Some(heads), Some(head_dim)]);
                    continue;
                }
                let features = if norms.flat { heads * head_dim } else { head_dim };
                self.norm(norm, features, if norms.flat { 1 } else { heads });
            }
        }
        if let Some(sinks) = &attention.sinks {
            self.tensor(sinks.clone(), &[Some(heads)]);
        }
    }

    fn mamba(&mut self, mamba: &Mamba, hidden: usize) {
        let (values, convolved, heads) = (mamba.values(), mamba.convolved(), Some(mamba.heads));
        self.linear(&mamba.input, Some(values + convolved + mamba.heads), Some(hidden), None);
        self.tensor(format!("{}.weight", mamba.convolution), &[Some(convolved), None, Some(1)]);
        self.optional(format!("{}.bias", mamba.convolution), &[Some(convolved)]);
        for of_heads in [&mamba.step_bias, &mamba.decay_log, &mamba.skip] {
            self.tensor(of_heads.clone(), &[heads]);
        }
        if let Some(norm) = &mamba.norm {
            self.norm(&norm.norm, values, 1);
        }
        self.linear(&mamba.output, Some(hidden), Some(values), None);
    }

    fn lightning(&mut self, attention: &LightningAttention, hidden: usize) {
        let width = attention.heads * attention.head_dim;
        self.linear(&attention.projection, Some(3 * width), Some(hidden), None);
        self.linear(&attention.gate, Some(width), Some(hidden), None);
        if let Some(norms) = &attention.norms {
            for norm in std::iter::once(&norms.q).chain(&norms.k) {
                self.norm(norm, attention.head_dim, 1);
            }
        }
        self.norm(&attention.norm.norm, width, 1);
        self.linear(&attention.output, Some(hidden), Some(width), None);
    }

    fn mlp(&mut self, mlp: &Mlp, hidden: usize, experts: Option<usize>) {
        for linear in mlp.gate.linears() {
            self.linear(linear, None, Some(hidden), experts);
        }
        self.linear(&mlp.down, Some(hidden), None, experts);
        if let Gate::Xielu { parameters, .. } = &mlp.gate {
            for name in ["alpha_p", "alpha_n", "beta", "eps"] {
                self.tensor(format!("{parameters}.{name}"), &[]);
            }
        }
    }

    fn latent(&mut self, layer: &LatentAttention, hidden: usize) {
        let &LatentAttention { heads, nope, rope, value, rank, .. } = layer;
        let query_rows = Some(heads * (nope + rope));
        match &layer.queries {
            LatentQueries::Direct(linear) => self.linear(linear, query_rows, Some(hidden), None),
            LatentQueries::LowRank { down, norm, up } => {
                self.linear(down, None, Some(hidden), None);
                self.linear(up, query_rows, None, None);
                if let Some(path) = &norm.path {
                    self.tensor(format!("{path}.weight"), &[None]);
                }
            }
        }
        self.linear(&layer.down, Some(rank + rope), Some(hidden), None);
        self.norm(&layer.norm, rank, 1);
        match &layer.keys {
            LatentKeys::Joint(linear) => self.linear(linear, Some(heads * (nope + value)), Some(rank), None),
            LatentKeys::Split { embed_q, unembed_out } => {
                self.tensor(embed_q.clone(), &[Some(heads), Some(rank), Some(nope)]);
                self.tensor(unembed_out.clone(), &[Some(heads), Some(value), Some(rank)]);
            }
        }
        self.linear(&layer.output, Some(hidden), Some(heads * value), None);
        if let Some(indexer) = &layer.indexer {
            self.linear(&indexer.queries, Some(indexer.heads * indexer.width), None, None);
            self.linear(&indexer.keys, Some(indexer.width), Some(hidden), None);
            self.linear(&indexer.weights, Some(indexer.heads), Some(hidden), None);
            self.norm(&indexer.norm, indexer.width, 1);
        }
    }

    fn delta_net(&mut self, net: &DeltaNet, hidden: usize) {
        let (keys, values) = (net.key_heads * net.key_dim, net.value_heads * net.value_dim);
        let heads = Some(net.value_heads);
        let input = Some(hidden);
        match &net.projections {
            DeltaProjections::Grouped { qkvz, ba } => {
                self.linear(qkvz, Some(2 * keys + 2 * values), input, None);
                self.linear(ba, Some(2 * net.value_heads), input, None);
            }
            DeltaProjections::Separate { qkv, z, b, a } => {
                self.linear(qkv, Some(2 * keys + values), input, None);
                self.linear(z, Some(values), input, None);
                self.linear(b, heads, input, None);
                self.linear(a, heads, input, None);
            }
            DeltaProjections::LowRank { qkv: [q, k, v], b, a, z } => {
                self.linear(q, Some(keys), input, None);
                self.linear(k, Some(keys), input, None);
                self.linear(v, Some(values), input, None);
                self.linear(b, heads, input, None);
                for ([down, up], rank, rows) in [(a, net.key_dim, keys), (z, net.value_dim, values)] {
                    self.linear(down, Some(rank), input, None);
                    self.linear(up, Some(rows), Some(rank), None);
                }
            }
        }
        match &net.convolutions[..] {
            [one] => self.tensor(format!("{one}.weight"), &[Some(2 * keys + values), None, Some(1)]),
            each => {
                for (convolution, channels) in each.iter().zip([keys, keys, values]) {
                    self.tensor(format!("{convolution}.weight"), &[Some(channels), None, Some(1)]);
                }
            }
        }
        if net.decays_by_feature() {
            self.tensor(net.dt_bias.clone(), &[Some(keys)]);
            self.tensor(net.decay_log.clone(), &[Some(1), Some(1), heads, Some(1)]);
        } else {
            self.tensor(net.dt_bias.clone(), &[heads]);
            self.tensor(net.decay_log.clone(), &[heads]);
        }
        self.norm(&net.norm, net.value_dim, 1);
        self.linear(&net.output, Some(hidden), Some(values), None);
    }

    fn layer(&mut self, layer: &Layer, hidden: usize, width: usize) {
        match layer {
            Layer::Attention(attention) => self.attention(attention, hidden),
            Layer::Latent(latent) => self.latent(latent, hidden),
            Layer::DeltaNet(net) => self.delta_net(net, hidden),
            Layer::ShortConvolution(convolution) => {
                self.linear(&convolution.input, Some(3 * hidden), Some(hidden), None);
                self.linear(&convolution.output, Some(hidden), Some(hidden), None);
                self.tensor(format!("{}.weight", convolution.convolution), &[Some(hidden), None, Some(1)]);
                self.optional(format!("{}.bias", convolution.convolution), &[Some(hidden)]);
            }
            Layer::Laurel { left, right, rank, norm } => {
                self.linear(left, Some(*rank), Some(hidden), None);
                self.linear(right, Some(hidden), Some(*rank), None);
                self.norm(norm, hidden, 1);
            }
            Layer::Mamba(mamba) => self.mamba(mamba, hidden),
            Layer::Lightning(attention) => self.lightning(attention, hidden),
            Layer::Mlp(mlp) => self.mlp(mlp, hidden, None),
            Layer::Moe(moe) => {
                let count = moe.experts.count();
                self.linear(&moe.router.linear, Some(count), Some(hidden), None);
                for of_experts in moe.router.correction.iter().chain(&moe.router.expert_scale) {
                    self.tensor(of_experts.clone(), &[Some(count)]);
                }
                if let Some(norm) = &moe.router.norm {
                    self.tensor(norm.scale.clone(), &[Some(hidden)]);
                }
                let mut width = hidden;
                if let Some(latent) = &moe.latent {
                    width = latent.width;
                    self.linear(&latent.down, Some(width), Some(hidden), None);
                    self.linear(&latent.up, Some(hidden), Some(width), None);
                }
                for (mlp, stacked) in moe.experts.networks() {
                    self.mlp(mlp, width, stacked);
                }
                if let Some(shared) = &moe.shared {
                    self.mlp(&shared.mlp, hidden, None);
                    if let Some(gate) = &shared.gate {
                        self.linear(gate, Some(1), Some(hidden), None);
                    }
                }
            }
            Layer::PerLayerInput { gate, projection, .. } => {
                self.linear(gate, Some(width), Some(hidden), None);
                self.linear(projection, Some(hidden), Some(width), None);
            }
        }
    }

    fn block(&mut self, block: &Block, hidden: usize, streams: usize, width: usize) {
        if let Some(update) = &block.update {
            self.norm(&update.norm, hidden, 1);
            self.linear(&update.router, Some(streams), Some(hidden), None);
            self.linear(&update.prediction, Some(streams * streams), Some(streams), None);
            self.linear(&update.correction, Some(streams), Some(streams), None);
            self.tensor(update.scale.clone(), &[Some(hidden)]);
        }
        for norm in block.norm.iter().chain(block.stages.iter().filter_map(|stage| stage.post_norm.as_ref()))
        {
            self.norm(norm, hidden, 1);
        }
        for branch in block.branches() {
            for norm in branch.norm.iter().chain(&branch.post_norm) {
                self.norm(norm, hidden, 1);
            }
            self.layer(&branch.layer, hidden, width);
        }
        if let Some(scalar) = &block.scalar {
            self.tensor(scalar.clone(), &[Some(1)]);
        }
    }
}

impl Mlp {
    /// Rows of the first linears, given the columns of the second.
    pub(crate) fn rows_for(&self, columns: usize) -> usize {
        if matches!(self.gate, Gate::Fused(_)) { 2 * columns } else { columns }
    }
}

impl Decoder {
    /// Every tensor that the forward pass reads.
    pub(crate) fn reads(&self) -> Reads {
        let mut reads = Reads::default();
        let hidden = self.hidden_size;
        let embedding = &self.embedding;
        reads.tensor(format!("{}.weight", embedding.path), &[Some(self.vocabulary), Some(hidden)]);
        if let Some(positions) = &embedding.positions {
            reads.tensor(format!("{positions}.weight"), &[None, Some(hidden)]);
        }
        let mut width = 0;
        if let Some(inputs) = &embedding.per_layer {
            width = inputs.width;
            let all = Some(width * self.blocks.len());
            reads.tensor(format!("{}.weight", inputs.path), &[inputs.rows, all]);
            reads.linear(&inputs.projection, all, Some(hidden), None);
            reads.norm(&inputs.norm, width, 1);
        }
        for block in &self.blocks {
            reads.block(block, hidden, self.stream_count(), width);
        }
        for linear in self.streams.iter().flat_map(|streams| streams.spread.iter().chain(&streams.gather)) {
            reads.linear(linear, Some(hidden), Some(hidden), None);
        }
        reads.norm(&self.norm, hidden, 1);
        if let Some(head) = &self.head.linear {
            reads.linear(head, Some(self.vocabulary), Some(hidden), None);
        }
        reads
    }

    /// All networks whose inner width only their tensors know, with the number of experts they are stacked for.
    pub(crate) fn networks(&self) -> impl Iterator<Item = &Mlp> {
        self.blocks.iter().flat_map(Block::layers).flat_map(|layer| match layer {
            Layer::Mlp(mlp) => vec![mlp],
            Layer::Moe(moe) => {
                let own = moe.experts.networks().into_iter().map(|(mlp, _)| mlp);
                own.chain(moe.shared.iter().map(|shared| &shared.mlp)).collect()
            }
            _ => Vec::new(),
        })
    }
}

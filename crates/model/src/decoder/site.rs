//! Sites: activations that linears read, the unit of every calibrated method.

use super::{Attention, Block, Branch, Experts, Gate, Layer, Linear, Mlp, Moe, Norm, Projections, Stage};

/// What made an activation, and so what a scale on it can be folded into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Producer<'d> {
    /// A norm; its weight can take a factor, if every reader of the norm takes the inverse.
    Norm(&'d Norm),
    /// The residual stream: nothing to fold into.
    Residual,
    /// `activation(gate) * up`: rows of `up` can take a factor.
    Product(&'d Mlp),
    /// The output of attention: rows of v can, where the head map allows.
    Attention(&'d Attention),
    /// Anything else.
    Other,
}

/// One activation that one or more linears read.
#[derive(Clone, Debug, PartialEq)]
pub struct Site<'d> {
    /// Where it comes from.
    pub producer: Producer<'d>,
    /// Who reads it; never empty.
    pub readers: Vec<&'d Linear>,
    /// Of which expert.
    pub expert: Option<usize>,
    /// The expert's place in its readers, where they are stacked.
    pub slice: Option<usize>,
}

impl Site<'_> {
    /// Whether no site before it has the same readers.
    pub fn has_own_readers(&self) -> bool {
        self.slice.is_none_or(|slice| slice == 0)
    }
}

impl Block {
    /// All sites of the block, in the order of the forward pass.
    pub fn sites(&self) -> Vec<Site<'_>> {
        let mut sites = Vec::new();
        for stage in &self.stages {
            stage.add_sites(&mut sites);
        }
        if let Some(update) = &self.update {
            update.others.add_sites(&mut sites);
        }
        sites
    }
}

impl Stage {
    fn add_sites<'d>(&'d self, sites: &mut Vec<Site<'d>>) {
        let first = sites.len();
        for branch in &self.branches {
            branch.add_sites(sites);
        }
        // What a Laurel reads goes into the stream as it is: a norm before it takes no factor.
        let passes = |branch: &Branch| matches!(branch.layer, Layer::Laurel { .. });
        if self.branches.iter().any(passes) {
            let own = sites[first..].iter_mut().filter(|site| matches!(site.producer, Producer::Norm(_)));
            own.for_each(|site| site.producer = Producer::Other);
        }
    }
}

impl Branch {
    /// The sites of this branch alone.
    pub fn sites(&self) -> Vec<Site<'_>> {
        let mut sites = Vec::new();
        self.add_sites(&mut sites);
        sites
    }

    fn add_sites<'d>(&'d self, sites: &mut Vec<Site<'d>>) {
        let input = self.norm.as_ref().map_or(Producer::Residual, Producer::Norm);
        let mut add = |producer, readers: Vec<&'d Linear>, expert| {
            sites.push(Site { producer, readers, expert, slice: expert });
        };
        match &self.layer {
            Layer::Attention(attention) => {
                let readers = attention.projections.linears().into_iter().chain(attention.gate());
                add(input, readers.collect(), None);
                let producer = match attention.projections {
                    Projections::Shared { .. } => Producer::Other,
                    _ => Producer::Attention(attention),
                };
                add(producer, vec![&attention.output], None);
            }
            Layer::Mlp(mlp) => mlp.add_sites(input, None, &mut add),
            Layer::Moe(moe) => {
                let apart = matches!(moe.experts, Experts::Apart(_));
                let mut own = |producer, readers, expert: Option<usize>| {
                    sites.push(Site { producer, readers, expert, slice: expert.filter(|_| !apart) });
                };
                moe.add_sites(input, &mut own);
            }
            Layer::Laurel { left, right, .. } => {
                add(input, vec![left], None);
                add(Producer::Other, vec![right], None);
            }
            Layer::PerLayerInput { gate, projection, .. } => {
                add(input, vec![gate], None);
                add(Producer::Other, vec![projection], None);
            }
            Layer::Latent(latent) => {
                // An indexer reads the norm beside them, and is no site's reader.
                let input = if latent.indexer.is_some() { Producer::Other } else { input };
                for (first, readers) in latent.sites() {
                    add(if first { input } else { Producer::Other }, readers, None);
                }
            }
            Layer::DeltaNet(net) => {
                add(input, net.projections.linears(), None);
                for linear in net.projections.inner() {
                    add(Producer::Other, vec![linear], None);
                }
                add(Producer::Other, vec![&net.output], None);
            }
            Layer::ShortConvolution(convolution) => {
                add(input, vec![&convolution.input], None);
                add(Producer::Other, vec![&convolution.output], None);
            }
            Layer::Mamba(mamba) => {
                add(input, vec![&mamba.input], None);
                // A gate on either side of the norm lets a factor of its weight through.
                let gated = mamba.norm.as_ref().map_or(Producer::Other, |norm| Producer::Norm(&norm.norm));
                add(gated, vec![&mamba.output], None);
            }
            Layer::Lightning(attention) => {
                add(input, vec![&attention.projection, &attention.gate], None);
                add(Producer::Norm(&attention.norm.norm), vec![&attention.output], None);
            }
        }
    }
}

impl Mlp {
    fn add_sites<'d>(
        &'d self,
        input: Producer<'d>,
        expert: Option<usize>,
        add: &mut impl FnMut(Producer<'d>, Vec<&'d Linear>, Option<usize>),
    ) {
        add(input, self.gate.linears(), expert);
        let product = match self.gate {
            Gate::None(_) | Gate::Xielu { .. } => Producer::Other,
            Gate::Separate { .. } | Gate::Fused(_) => Producer::Product(self),
        };
        add(product, vec![&self.down], expert);
    }
}

impl Moe {
    fn add_sites<'d>(
        &'d self,
        input: Producer<'d>,
        add: &mut impl FnMut(Producer<'d>, Vec<&'d Linear>, Option<usize>),
    ) {
        let gate = self.shared.iter().filter_map(|shared| shared.gate.as_ref());
        // Beside a router with a norm of its own no site has all tokens that the experts' norm gives, to choose factors from.
        let input = if self.router.norm.is_some() { Producer::Other } else { input };
        let down = self.latent.iter().map(|latent| &latent.down);
        add(input, std::iter::once(&self.router.linear).chain(gate).chain(down).collect(), None);
        let of_experts = if self.latent.is_some() { Producer::Other } else { input };
        for expert in 0..self.experts.count() {
            self.experts.of(expert).0.add_sites(of_experts, Some(expert), add);
        }
        if let Some(latent) = &self.latent {
            add(Producer::Other, vec![&latent.up], None);
        }
        if let Some(shared) = &self.shared {
            shared.mlp.add_sites(input, None, add);
        }
    }
}

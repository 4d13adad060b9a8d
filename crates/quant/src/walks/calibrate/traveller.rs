//! A batch of windows on its way through a block, and the steps that it takes.

use mlx_quant_engine::Tensor;
use mlx_quant_model::{Course, Progress, Site, State, Stop, WeightsError};

use crate::Error;

/// One batch of windows within a block.
pub(super) struct Traveller<'f> {
    course: Course<'f>,
    windows: usize,
    /// Where it stands: the step, its sites that some of the batch's tokens stand before, and what stands there.
    at: Option<(usize, Vec<(usize, Stop)>)>,
    /// What the router read, which stood at the site before the first expert's.
    routed: Option<Tensor>,
    pub(super) done: Option<State>,
}

/// Which site of the block a stop is.
fn site_of(sites: &[Site<'_>], stop: &Stop) -> Result<usize, Error> {
    let same =
        |site: &&Site<'_>| site.expert == stop.expert && site.readers.iter().copied().eq(stop.readers.iter());
    let unknown = || {
        let readers: Vec<&str> = stop.readers.iter().map(|reader| reader.path.as_str()).collect();
        WeightsError::Tensor(mlx_quant_engine::Error::msg(format!(
            "no site of the block is read by {readers:?}"
        )))
    };
    Ok(sites.iter().position(|site| same(&site)).ok_or_else(unknown)?)
}

impl<'f> Traveller<'f> {
    pub(super) fn new(course: Course<'f>, windows: usize) -> Self {
        Self { course, windows, at: None, routed: None, done: None }
    }

    fn advance(&mut self, steps: &Steps<'_>, weights: Vec<Option<Vec<Tensor>>>) -> Result<(), Error> {
        match self.course.advance(weights).map_err(WeightsError::from)? {
            Progress::At(stops) => {
                let stand = |stop: Stop| Ok((site_of(steps.sites, &stop)?, stop));
                let stands = stops.into_iter().map(stand).collect::<Result<Vec<_>, Error>>()?;
                self.at = stands.first().map(|(site, _)| steps.of[*site]).map(|step| (step, stands));
            }
            Progress::Done(state) => (self.at, self.done) = (None, Some(state)),
        }
        Ok(())
    }

    /// Goes on until it stands at a step or behind it; `answers` holds the weights of the sites that were visited.
    pub(super) fn reach(
        &mut self,
        steps: &Steps<'_>,
        step: usize,
        answers: &[Option<Vec<Tensor>>],
    ) -> Result<(), Error> {
        if self.at.is_none() && self.done.is_none() {
            self.advance(steps, Vec::new())?;
            self.note_routed(steps.sites);
        }
        while let Some((_, stands)) = self.at.as_ref().filter(|(at, _)| *at < step) {
            let weights = stands.iter().map(|(site, _)| answers.get(*site).cloned().flatten()).collect();
            self.advance(steps, weights)?;
            self.note_routed(steps.sites);
        }
        Ok(())
    }

    fn note_routed(&mut self, sites: &[Site<'_>]) {
        let Some((_, stands)) = &self.at else { return };
        if let [(site, stop)] = &stands[..]
            && stop.expert.is_none()
            && sites.get(site + 1).is_some_and(|next| next.expert.is_some())
        {
            self.routed = Some(stop.input.clone());
        }
    }

    pub(super) fn input(&self, site: usize) -> Option<&Tensor> {
        let (_, stands) = self.at.as_ref()?;
        stands.iter().find(|(own, _)| *own == site).map(|(_, stop)| &stop.input)
    }

    /// What stands at a site of the first `windows` windows, one by one; where tokens were sorted out of them (before an
    /// expert), a part of the tokens together.
    pub(super) fn sample(&self, site: usize, windows: usize) -> mlx_quant_engine::Result<Vec<Tensor>> {
        let Some(input) = self.input(site) else { return Ok(Vec::new()) };
        let windows = windows.min(self.windows);
        if input.rank() > 2 {
            return (0..windows).map(|window| input.narrow(0, window, 1)).collect();
        }
        let rows = (input.dim(0)? * windows).div_ceil(self.windows.max(1));
        Ok(vec![input.narrow(0, 0, rows)?])
    }
}

/// A block's sites in the order in which windows come to them: one at a time, but those of several experts at once.
pub(super) struct Steps<'s> {
    sites: &'s [Site<'s>],
    pub(super) all: Vec<Vec<usize>>,
    /// The step of each site.
    pub(super) of: Vec<usize>,
}

impl<'s> Steps<'s> {
    /// With so many experts of a layer at once: what they all read first, then what they read next.
    pub(super) fn new(sites: &'s [Site<'s>], experts: usize) -> Self {
        let experts = experts.max(1);
        let group = |site: &Site<'_>| site.expert.map(|expert| expert / experts);
        let (mut all, mut of): (Vec<Vec<usize>>, Vec<usize>) = (Vec::new(), Vec::new());
        // First step of the group that is under way, and how many sites of the last expert have come.
        let (mut first, mut own) = (0, 0);
        for (at, site) in sites.iter().enumerate() {
            let before = at.checked_sub(1).map(|before| &sites[before]);
            if site.expert.is_none() || before.is_none_or(|before| group(before) != group(site)) {
                (first, own) = (all.len(), 0);
            } else if before.is_some_and(|before| before.expert != site.expert) {
                own = 0;
            }
            let step = first + own;
            if step == all.len() {
                all.push(Vec::new());
            }
            all[step].push(at);
            of.push(step);
            own += 1;
        }
        Self { sites, all, of }
    }
}

/// A batch of windows on both streams, where they stand at a site.
pub(super) struct Meeting {
    pub(super) own: Option<Stop>,
    pub(super) full: Option<Stop>,
    pub(super) routed: Option<Tensor>,
}

impl Meeting {
    pub(super) fn of(own: &Traveller<'_>, full: &Traveller<'_>, site: usize) -> Self {
        let at = |traveller: &Traveller<'_>| {
            let (_, stands) = traveller.at.as_ref()?;
            stands.iter().find(|(own, _)| *own == site).map(|(_, stop)| stop.clone())
        };
        Self { own: at(own), full: at(full), routed: full.routed.clone() }
    }
}

#[cfg(test)]
mod tests {
    use mlx_quant_model::decoder::Linear;
    use mlx_quant_model::{Producer, Site};

    use super::Steps;

    /// Sites in front of, of and behind a layer of experts, whose readers each have `per` sites.
    fn steps(experts: usize, per: usize, together: usize) -> (Vec<Vec<usize>>, Vec<usize>) {
        let linear = Linear { path: "a".to_owned() };
        let site = |expert| Site { producer: Producer::Other, readers: vec![&linear], expert, slice: expert };
        let of_experts = (0..experts).flat_map(|expert| (0..per).map(move |_| Some(expert)));
        let sites: Vec<Site<'_>> =
            [None].into_iter().chain(of_experts).chain([None, None]).map(site).collect();
        let Steps { all, of, .. } = Steps::new(&sites, together);
        (all, of)
    }

    #[test]
    fn experts_of_a_group_come_to_each_of_their_sites_together() {
        let (all, of) = steps(3, 2, 1);
        assert_eq!(all, (0..9).map(|site| vec![site]).collect::<Vec<_>>());
        assert_eq!(of, (0..9).collect::<Vec<_>>());
        let (all, of) = steps(5, 2, 2);
        let expected: [&[usize]; 9] = [&[0], &[1, 3], &[2, 4], &[5, 7], &[6, 8], &[9], &[10], &[11], &[12]];
        assert_eq!(all, expected);
        assert_eq!(of, [0, 1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]);
        assert_eq!(steps(4, 1, 64).0, [vec![0], vec![1, 2, 3, 4], vec![5], vec![6]]);
    }
}

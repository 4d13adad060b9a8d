//! The way of a request through any of them.

use std::net::TcpListener;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request as Incoming;
use axum::http::header::{AUTHORIZATION, RANGE};
use axum::http::request::Parts;
use axum::http::{Method, Uri};
use axum::response::Response;

use crate::answer::Answer;
use crate::call::bearer;
use crate::cas::Cas;
use crate::cdn;
use crate::fault::Fault;
use crate::record::{Request, Server};
use crate::routes;
use crate::state::{RUN, Shared};

/// Serves one listener until the runtime ends.
pub(crate) async fn serve(listener: TcpListener, server: Server, shared: Arc<Shared>) {
    let router =
        Router::new().fallback(move |request: Incoming| answer(Arc::clone(&shared), server, request));
    if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
        let _ = axum::serve(listener, router).await;
    }
}

async fn answer(shared: Arc<Shared>, server: Server, request: Incoming) -> Response {
    let (mut parts, body) = request.into_parts();
    if server == Server::Xet {
        strip(&mut parts.uri);
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let method = parts.method.as_str().to_owned();
    let line = format!("{} {method} {path}", server.name());
    let token = shared.store().token.clone();
    let entry = shared.record.open(Request {
        server,
        method: method.clone(),
        path,
        range: parts.headers.get(RANGE).map(|range| String::from_utf8_lossy(range.as_bytes()).into_owned()),
        status: 0,
        sent: 0,
        authorization: parts.headers.contains_key(AUTHORIZATION),
        token: token.is_some() && token.as_deref() == bearer(&parts.headers),
    });
    let fault = shared.faults.take(&method, &line);
    // The body is read in any case: a connection that is answered too early breaks in the client's hands.
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let head = parts.method == Method::HEAD;
    let answer = if let Some(answer) = fault.as_ref().and_then(Answer::instead) {
        answer
    } else {
        if fault == Some(Fault::IgnoreRange) {
            parts.headers.remove(RANGE);
        }
        handle(&shared, server, parts, body).await
    };
    answer.send(head, fault.as_ref(), entry)
}

/// Takes away the part of the path that tells runs apart.
fn strip(uri: &mut Uri) {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let rest =
        path.strip_prefix('/').filter(|path| path.starts_with(RUN)).and_then(|path| path.split_once('/'));
    if let Some(stripped) = rest.and_then(|(_, rest)| format!("/{rest}").parse().ok()) {
        *uri = stripped;
    }
}

async fn handle(shared: &Shared, server: Server, parts: Parts, body: bytes::Bytes) -> Answer {
    match server {
        Server::Hub => routes::answer(shared, &parts, &body).await,
        Server::Cdn => cdn::answer(shared, &parts, body),
        // An empty listing, so that whoever follows a link to here does not notice.
        Server::Elsewhere => Answer::text(200, "application/json", "[]"),
        Server::Xet => match bearer(&parts.headers) {
            Some(token) if !Cas::issued(token) => {
                Answer::error(401, "", "This token is not of the xet store")
            }
            _ => shared.cas.forward(Incoming::from_parts(parts, Body::from(body))).await,
        },
    }
}

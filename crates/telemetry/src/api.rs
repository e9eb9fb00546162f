//! How a daemon's admin API is put together: routes that can be listed, queries that are checked, errors that are JSON.
//!
//! Invariant: a route that is served is in [`Api::routes`], so that a test can hold the API's document true.

use std::collections::BTreeSet;

use axum::extract::{FromRequestParts, Query};
use axum::handler::Handler;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What [`watched_router`](crate::watched_router) serves.
const WATCHED_PATHS: [&str; 3] = ["/metrics", "/healthz", "/readyz"];

/// Method and path of a route, such as `("GET", "/v1/status")`.
pub type Route = (&'static str, &'static str);

/// Routes as they are added.
pub struct Api<S> {
    router: Router<S>,
    routes: Vec<Route>,
}

impl<S: Clone + Send + Sync + 'static> Default for Api<S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S: Clone + Send + Sync + 'static> Api<S> {
    /// The API's document only, at `GET /v1/openapi.json`.
    pub fn new() -> Self {
        let api = Self {
            router: Router::new(),
            routes: Vec::new(),
        };
        api.get("/v1/openapi.json", || async {
            (
                [(axum::http::header::CONTENT_TYPE, "application/json")],
                crate::openapi::DOCUMENT,
            )
        })
    }

    /// Adds something to read.
    #[must_use]
    pub fn get<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.route(("GET", path), get(handler))
    }

    /// Adds an order.
    #[must_use]
    pub fn post<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.route(("POST", path), post(handler))
    }

    fn route(mut self, (method, path): Route, handler: MethodRouter<S>) -> Self {
        self.routes.push((method, path));
        Self {
            router: self.router.route(path, handler),
            routes: self.routes,
        }
    }

    /// Adds what is served to those who watch the daemon as well: [`watched_router`](crate::watched_router).
    #[must_use]
    pub fn watched(mut self, router: Router) -> Self {
        self.routes.extend(WATCHED_PATHS.map(|path| ("GET", path)));
        Self {
            router: self.router.merge(router.with_state(())),
            routes: self.routes,
        }
    }

    /// What is served, in the order of adding.
    pub fn routes(&self) -> BTreeSet<(String, String)> {
        let owned = |(method, path): &Route| ((*method).to_owned(), (*path).to_owned());
        self.routes.iter().map(owned).collect()
    }

    /// The router. What is not a route, or not with this method, is answered with an error in JSON.
    pub fn into_router(self, state: S) -> Router {
        self.router
            .fallback(|| async { refusal(StatusCode::NOT_FOUND, "there is no such path in this API") })
            .method_not_allowed_fallback(|| async {
                refusal(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
            })
            .with_state(state)
    }
}

/// An answer that says what is wrong, in its field `error`.
pub fn refusal(status: StatusCode, text: &str) -> (StatusCode, Json<Value>) {
    (status, Json(json!({"error": text})))
}

/// A request's parameters. Unknown ones are refused by name if `T` denies unknown fields.
#[derive(Debug)]
pub struct ApiQuery<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = (StatusCode, Json<Value>);

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(parameters)) => Ok(Self(parameters)),
            Err(rejection) => Err(refusal(StatusCode::BAD_REQUEST, &rejection.body_text())),
        }
    }
}

-- name: lock_identity
-- Serialises those who link one identity, also where the unique index is missing. Taken before any row lock, one per
-- transaction. $1 a text that names the identity.
SELECT pg_advisory_xact_lock(1801548131, hashtext($1));

-- name: lock_user
-- Makes other changes to this user's accounts and sessions wait. $1 user.
SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE;

-- name: account_of_identity
-- Whose an identity at a provider is. $1 provider, $2 the provider's id.
SELECT id, user_id, provider, provider_account_id, expires_at, created_at, coalesce(password, '') <> '' AS has_password
FROM accounts
WHERE provider = $1 AND provider_account_id = $2
ORDER BY created_at, id
LIMIT 1;

-- name: insert_account
-- A new identity; no row when somebody has it already.
-- $1 id, $2 user, $3 provider, $4 the provider's id, $5 access token, $6 refresh token, $7 expires at, $8 now.
INSERT INTO accounts (id, user_id, provider, provider_account_id, access_token, refresh_token, expires_at, password, created_at)
SELECT $1::text, $2::text, $3::text, $4::text, $5::text, $6::text, $7::timestamp, NULL, $8::timestamp
WHERE NOT EXISTS (SELECT 1 FROM accounts WHERE provider = $3 AND provider_account_id = $4)
ON CONFLICT DO NOTHING
RETURNING
    id, user_id, provider, provider_account_id, expires_at, created_at, coalesce(password, '') <> '' AS has_password;

-- name: refresh_tokens
-- New tokens for an identity that this user already has; no row when it is another user's. An access token brings its
-- expiry with it; a token that is NULL leaves the old one.
-- $1 user, $2 provider, $3 the provider's id, $4 access token, $5 refresh token, $6 expires at.
UPDATE accounts
SET
    access_token = coalesce($4::text, access_token),
    refresh_token = coalesce($5::text, refresh_token),
    expires_at = CASE WHEN $4::text IS NULL THEN coalesce($6::timestamp, expires_at) ELSE $6 END
WHERE user_id = $1 AND provider = $2 AND provider_account_id = $3
RETURNING
    id, user_id, provider, provider_account_id, expires_at, created_at, coalesce(password, '') <> '' AS has_password;

-- name: accounts_of_user
-- A user's ways in, oldest first. $1 user.
SELECT id, user_id, provider, provider_account_id, expires_at, created_at, coalesce(password, '') <> '' AS has_password
FROM accounts
WHERE user_id = $1
ORDER BY created_at, id;

-- name: lock_accounts
-- A user's accounts, and which of them one can sign in with: a credential only when it has a password. $1 user.
SELECT id, provider <> 'credential' OR coalesce(password, '') <> '' AS is_way_in
FROM accounts
WHERE user_id = $1
ORDER BY id
FOR UPDATE;

-- name: delete_account
-- $1 account, $2 its user.
DELETE FROM accounts WHERE id = $1 AND user_id = $2 RETURNING id;

-- name: delete_accounts
-- Every way in of a user whom another takes over. Rows are locked in id order. $1 user.
WITH locked AS MATERIALIZED (SELECT a.id FROM accounts a WHERE a.user_id = $1 ORDER BY a.id FOR UPDATE)
DELETE FROM accounts a USING locked WHERE a.id = locked.id;

-- name: tokens_of_provider
-- A user with the oldest account at a provider, if there is one. $1 user, $2 provider.
SELECT a.id, a.access_token, a.refresh_token, a.expires_at
FROM users u
LEFT JOIN accounts a ON a.user_id = u.id AND a.provider = $2
WHERE u.id = $1
ORDER BY a.created_at, a.id
LIMIT 1;

-- name: lock_tokens
-- The tokens of an account as they are once nobody else refreshes them. $1 account.
SELECT id, access_token, refresh_token, expires_at FROM accounts WHERE id = $1 FOR NO KEY UPDATE;

-- name: store_tokens
-- What a refresh brought; without a new refresh token the old one stays.
-- $1 account, $2 access token, $3 refresh token or NULL, $4 expires at, or NULL.
UPDATE accounts SET access_token = $2, refresh_token = coalesce($3::text, refresh_token), expires_at = $4
WHERE id = $1;
